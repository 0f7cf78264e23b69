"""Owns the settings: the one frozen object that every process starts with, how it is made and shown.

Rules: parsed once, at start, from what is handed in; all problems are reported together, each with the
variable, what is wrong and the fix, and exit code 2; no secret stands in a problem or in what is shown.
Units stand in the names.
Leaves to others: the list of options (`skipbus.shared.options`) and where values come from
(`skipbus.shared.config_sources`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from skipbus.shared.config_sources import ENVIRONMENT, ProblemError, Raw, Sources, read_sources, shown
from skipbus.shared.errors import OperatorError
from skipbus.shared.option_kinds import NO_FILE
from skipbus.shared.options import CONFIG_FILE, IDENTITIES_PLACE, OPTIONS, REMOTE_PREFIX, Option, remote_number
from skipbus.shared.peers_config import Link, PeerSettings, describe_peer, read_peers
from skipbus.shared.protocol.system_ids import RemoteSystemIds, validate_pattern
from skipbus.shared.secret import Secret

__all__ = [
    "EXIT_BAD_CONFIGURATION",
    "ConfigurationError",
    "MySqlSettings",
    "PeerSettings",
    "Secret",
    "Settings",
    "config_from_argv",
    "describe",
    "load_settings",
    "load_settings_or_exit",
    "project_version",
]

EXIT_BAD_CONFIGURATION = 2
_DEFAULT = "default"
# An announcement carries a public key for every epoch of a key's lifetime, so their number has to stay sane.
_MAX_LIVE_EPOCHS = 2048
MAX_IDENTITY_PATTERN = 256
_REMOTE_FIX = f"Set {REMOTE_PREFIX}1 and following to the ids, or globs of ids, of the key providers at the other ends."


class ConfigurationError(OperatorError):
    """The configuration cannot be used. `problems` holds a text for each fault, all of them at once."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class MySqlSettings:
    """How this process reaches the store."""

    host: str
    port: int
    user: str
    password: Secret
    database: str


@dataclass(frozen=True)
class TlsSettings:
    """How the api serves TLS itself. ``identities`` maps patterns to what those callers may ask for."""

    port: int
    cert_files: tuple[Path, ...]
    key_files: tuple[Path, ...]
    client_ca_files: tuple[Path, ...]
    psk_files: tuple[Path, ...]
    handshake_timeout_seconds: float
    max_connections_per_address: int
    identities: Mapping[str, tuple[str, ...]] = field(hash=False)

    @property
    def enabled(self) -> bool:
        """Whether there is anything to serve TLS with."""
        return bool(self.cert_files or self.psk_files)


@dataclass(frozen=True)
class Settings:
    """Everything that a process is told from outside. `origins` says where each value came from."""

    environment: Literal["development", "production"]
    debug: bool
    local_system_id: str
    remote_system_ids: tuple[str, ...]
    mysql: MySqlSettings
    rabbitmq_url: Secret
    keyring_dir: Path
    key_ttl_seconds: int
    epoch_seconds: int
    host: str
    port: int
    allow_plaintext: bool
    tls: TlsSettings
    api_workers: int
    heartbeat_seconds: float
    request_timeout_seconds: float
    header_timeout_seconds: float
    keepalive_seconds: float
    max_connections: int
    max_batch: int
    max_queue: int
    sync_timeout_seconds: float
    retrieve_wait_seconds: float
    metrics_port: int
    log_level: str
    config_file: str | None = None
    peers: Mapping[str, PeerSettings] = field(default_factory=dict, hash=False)
    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def link_of(self, system_id: str) -> Link:
        """How this KP reaches a peer; whoever has no table of his own is in the same store."""
        peer = self.peers.get(system_id)
        return "store" if peer is None else peer.link

    @property
    def bus_peers(self) -> tuple[PeerSettings, ...]:
        """The peers that keys travel to over a bus, in the order of the TOML file."""
        return tuple(peer for peer in self.peers.values() if peer.link == "bus")


def load_settings(environ: Mapping[str, str]) -> Settings:
    """Parse and check everything. Raises `ConfigurationError` with all problems."""
    sources = read_sources(environ)
    origins: dict[str, str] = {}
    values = _read_options(sources, origins)
    values["config_file"] = sources.toml_path
    values["peers"] = _read_peers(sources, values.get("local_system_id"))
    listed = _read_remotes(sources, origins)
    values["remote_system_ids"] = _with_peers(listed, values["peers"], values.get("local_system_id"))
    values["tls.identities"] = _read_identities(sources)
    sources.problems.extend(_cross_check(values))
    if sources.problems:
        raise ConfigurationError(tuple(sources.problems))
    return _assemble(values, origins)


def _read_options(sources: Sources, origins: dict[str, str]) -> dict[str, Any]:
    """Map fields to values; a field whose option has a problem is left out."""
    values: dict[str, Any] = {}
    for option in OPTIONS:
        try:
            raw = sources.find(option) or _default(option)
            values[option.field] = _parse(option, raw)
            origins[option.name] = raw.origin
        except ProblemError as problem:
            sources.problems.append(str(problem))
    return values


def _default(option: Option) -> Raw:
    if option.default is None:
        raise ProblemError(f"{option.name} is missing. {option.fix}")
    return Raw(option.default, option.name, _DEFAULT)


def _parse(option: Option, raw: Raw) -> object:
    try:
        return option.kind.parse(raw.text)
    except ValueError as error:
        # A secret's kind says in a sentence of its own what is wrong, without the text.
        value = "is refused" if option.secret else f"is '{shown(raw.text)}'"
        raise ProblemError(
            f"{raw.name} {value}: {str(error) or 'it is not ' + option.kind.wants}. {option.fix}"
        ) from None


def _read_remotes(sources: Sources, origins: dict[str, str]) -> tuple[str, ...]:
    """The remote ids in their order, without those that have a problem."""
    names: dict[str, str] = {}
    found = sources.find_remotes()
    if not found and not sources.find_peers():
        sources.problems.append(f"{REMOTE_PREFIX}1 is missing. {_REMOTE_FIX}")
    for position, given in enumerate(found, 1):
        try:
            raw = _checked_remote(given, names)
        except ProblemError as problem:
            sources.problems.append(str(problem))
            continue
        names[raw.text] = raw.name
        origins[raw.name if raw.origin == ENVIRONMENT else f"{REMOTE_PREFIX}{position}"] = raw.origin
    return tuple(names)


def _checked_remote(raw: Raw | ProblemError, names: Mapping[str, str]) -> Raw:
    if isinstance(raw, ProblemError):
        raise raw
    if raw.text in names:
        raise ProblemError(f"{raw.name} is '{shown(raw.text)}', as {names[raw.text]} is. Remove one of them.")
    try:
        validate_pattern(raw.text)
    except ValueError as error:
        raise ProblemError(f"{raw.name} is '{shown(raw.text)}': {error}. {_REMOTE_FIX}") from None
    return raw


def _read_peers(sources: Sources, local_id: str | None) -> dict[str, PeerSettings]:
    peers, problems = read_peers(sources.find_peers(), str(sources.toml_path), local_id)
    sources.problems.extend(problems)
    return peers


def _with_peers(listed: tuple[str, ...], peers: Mapping[str, PeerSettings], local_id: str | None) -> tuple[str, ...]:
    """The listed remote ids, and the peers that none of them stands for."""
    known = RemoteSystemIds(listed, local_id)
    return (*listed, *(system_id for system_id in peers if system_id not in known))


def _read_identities(sources: Sources) -> dict[str, tuple[str, ...]]:
    """The TOML table of identities, without the entries that have a problem."""
    table: dict[str, tuple[str, ...]] = {}
    for pattern, value in sources.find_identities().items():
        try:
            table[pattern] = _checked_identity(pattern, value)
        except ValueError as error:
            place = f"{sources.toml_path}: {IDENTITIES_PLACE}.{shown(pattern)}"
            sources.problems.append(f'{place}: {error}. Write it as "router-*" = ["KP_Bob"].')
    return table


def _checked_identity(pattern: str, value: object) -> tuple[str, ...]:
    if not 1 <= len(pattern) <= MAX_IDENTITY_PATTERN or not pattern.isprintable():
        raise ValueError(f"the pattern has not 1 to {MAX_IDENTITY_PATTERN} printable characters")
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ValueError("it is not a list of remote system ids")
    return tuple(validate_pattern(entry) for entry in value)


def _cross_check(values: Mapping[str, object]) -> Iterator[str]:
    """What only two options together show; a field with a problem of its own is not there to be judged."""
    match values:
        case {"key_ttl_seconds": int(ttl), "epoch_seconds": int(epoch)} if ttl > epoch * _MAX_LIVE_EPOCHS:
            yield (
                f"SKIP_EPOCH_SECONDS is {epoch}, so that a key's lifetime of {ttl} s spans more than"
                f" {_MAX_LIVE_EPOCHS} epochs. Set it to {-(-ttl // _MAX_LIVE_EPOCHS)} or more."
            )
    match values:
        case {"max_batch": int(batch), "max_queue": int(queue)} if batch > queue:
            yield (
                f"SKIP_MAX_QUEUE is {queue}, less than SKIP_MAX_BATCH, {batch}: a batch could never fill."
                f" Set it to {batch} or more."
            )
    match values:
        case {"port": int(port), "metrics_port": int(metrics), "api_workers": int(workers)} if metrics:
            yield from _check_metrics_ports(port, metrics, workers)
    yield from _check_tls(values)


def _check_tls(values: Mapping[str, Any]) -> Iterator[str]:
    certs, keys = values.get("tls.cert_files"), values.get("tls.key_files")
    if certs is None or keys is None:
        return
    if len(certs) != len(keys):
        yield (
            f"SKIP_TLS_CERT_FILE names {len(certs)} files and SKIP_TLS_KEY_FILE {len(keys)}."
            " Name one private key for each certificate chain, in the same order."
        )
    if values.get("tls.client_ca_files") and not certs:
        yield "SKIP_TLS_CLIENT_CA_FILE is set without SKIP_TLS_CERT_FILE. Set both, or remove it."
    match values:
        case {"port": int(port), "tls.port": int(tls), "tls.psk_files": files} if port == tls and (certs or files):
            yield f"SKIP_TLS_PORT is {tls}, as SKIP_PORT is. Set it to another port."


def _check_metrics_ports(port: int, metrics: int, workers: int) -> Iterator[str]:
    """Each api worker is a process and serves its metrics on a port of its own, counted up from the first."""
    if metrics <= port < metrics + workers:
        yield f"SKIP_METRICS_PORT takes port {port} too, which is SKIP_PORT. Set it to another port."
    if metrics + workers - 1 > 65535:
        yield f"SKIP_METRICS_PORT is {metrics}: {workers} workers need {workers} ports. Set it lower."


def _assemble(values: dict[str, Any], origins: dict[str, str]) -> Settings:
    mysql = {field: values.pop(f"mysql.{field}") for field in ("host", "port", "user", "password", "database")}
    tls = {name.removeprefix("tls."): values.pop(name) for name in list(values) if name.startswith("tls.")}
    if values["debug"]:
        values["log_level"] = "debug"
        origins["SKIP_LOG_LEVEL"] = "SKIP_DEBUG"
    return Settings(mysql=MySqlSettings(**mysql), tls=TlsSettings(**tls), origins=origins, **values)


def describe(settings: Settings) -> list[tuple[str, str, str]]:
    """The effective configuration as (variable, value, origin) lines. Secrets show as `***`."""
    values = {option.name: _shown_value(settings, option.field) for option in OPTIONS}
    remote_names = [name for name in settings.origins if remote_number(name)]
    # The ids that only a table of a peer names come after the listed ones, and are shown with the peers.
    values |= dict(zip(remote_names, settings.remote_system_ids, strict=False))
    lines = [(name, value, settings.origins[name]) for name, value in values.items()]
    for pattern, allowed in settings.tls.identities.items():
        lines.append((f'identities."{pattern}"', ", ".join(allowed) or NO_FILE, f"TOML {settings.config_file}"))
    origin = f"TOML {settings.config_file}"
    lines.extend((f'peers."{peer.system_id}"', describe_peer(peer), origin) for peer in settings.peers.values())
    if settings.config_file is not None:
        lines.insert(0, (CONFIG_FILE, settings.config_file, ENVIRONMENT))
    return lines


def _shown_value(settings: Settings, field: str) -> str:
    value = attrgetter(field)(settings)
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or NO_FILE
    return str(value).lower() if isinstance(value, bool) else str(value)


def describe_text(settings: Settings) -> str:
    """`describe` as aligned lines for a terminal."""
    lines = describe(settings)
    width = max(len(name) for name, _, _ in lines)
    return "".join(f"{name:<{width}} = {value}  ({origin})\n" for name, value, origin in lines)


def load_settings_or_exit(environ: Mapping[str, str], program: str) -> Settings:
    """`load_settings`; where that fails, print every problem on stderr and exit with code 2."""
    try:
        return load_settings(environ)
    except ConfigurationError as error:
        sys.stderr.write(problems_text(error, program))
        raise SystemExit(EXIT_BAD_CONFIGURATION) from None


def problems_text(error: ConfigurationError, program: str) -> str:
    """What an operator reads where the configuration cannot be used: one line a problem."""
    count = len(error.problems)
    head = f"{program}: the configuration has {count} problem{'s' if count > 1 else ''}:\n"
    return head + "".join(f"  {problem}\n" for problem in error.problems)


def config_from_argv(program: str, argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """The settings for a service's `main`; `argv` is without the program's own name.

    Exits with 0 after `--check-config`, `--help` and `--version`, with 2 for a bad configuration or argument.
    """
    arguments = _service_parser(program).parse_args(argv)
    settings = load_settings_or_exit(environ, program)
    if arguments.check_config:
        sys.stdout.write(f"{program} {project_version()} would run with:\n{describe_text(settings)}")
        raise SystemExit(0)
    return settings


def _service_parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Configured by environment variables and an optional TOML file, not by arguments.",
        epilog=variables_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check-config", action="store_true", help="say what would run, and exit with 0 or 2")
    parser.add_argument("--version", action="version", version=f"{program} {project_version()}")
    return parser


def variables_help() -> str:
    """Every variable with its default and meaning, for `--help`."""
    return "".join(f"{name}\n    {text}\n" for name, text in _variables())


def _variables() -> Iterator[tuple[str, str]]:
    for option in OPTIONS:
        shown_default = "required" if option.default is None else f"default {option.default}"
        name = f"{option.name}, {option.file_name}" if option.secret else option.name
        yield name, f"{option.help} ({shown_default})"
    yield (
        f"{REMOTE_PREFIX}1..n",
        "ids, or globs of ids, of the key providers at the other ends (one is required)",
    )
    yield CONFIG_FILE, "a TOML file for what is not set by variables; secrets have no place in it"


def project_version() -> str:
    """The installed distribution's version."""
    try:
        return metadata.version("skipbus")
    except metadata.PackageNotFoundError:
        return "0+unknown"
