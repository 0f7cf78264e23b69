"""Reads the settings once, at the start of a process, and reports every problem at once.

Rules: all problems are reported together, each with the variable, what is wrong and the fix. A setting with a problem
of its own is not judged together with others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from skipbus.shared.errors import OperatorError
from skipbus.shared.protocol.system_ids import RemoteSystemIds, validate_pattern
from skipbus.shared.settings.model import (
    IDENTITIES_PLACE,
    OPTIONS,
    REMOTE_PREFIX,
    MySqlSettings,
    Option,
    Settings,
    TlsSettings,
)
from skipbus.shared.settings.peers import PeerSettings, read_peers
from skipbus.shared.settings.secret import Secret
from skipbus.shared.settings.sources import ENVIRONMENT, ProblemError, Raw, Sources, read_sources, service_links
from skipbus.shared.settings.values import parse, shown

# An announcement has a public key for every epoch of a key's lifetime, so their number has to stay sane.
_MAX_LIVE_EPOCHS = 2048
_MAX_IDENTITY_PATTERN = 256
_REMOTE_FIX = f"Set {REMOTE_PREFIX}1 and following to the ids, or globs of ids, of the key providers at the other ends."


class ConfigurationError(OperatorError):
    """The configuration cannot be used. `problems` holds a text for each fault, all of them at once."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def load_settings(environ: Mapping[str, str]) -> Settings:
    """Reads and checks everything. Raises `ConfigurationError` with all problems."""
    sources = read_sources(environ)
    origins: dict[str, str] = {}
    values = _read_options(sources, origins)
    local_id = values.get("local_system_id")
    peers, problems = read_peers(sources.find_peers(), str(sources.toml_path), local_id)
    sources.problems.extend(problems)
    values |= {"config_file": sources.toml_path, "peers": peers, "tls.identities": _read_identities(sources)}
    values["remote_system_ids"] = _with_peers(_read_remotes(sources, origins), peers, local_id)
    sources.problems.extend(_check_together(values))
    if sources.problems:
        raise ConfigurationError(tuple(sources.problems))
    return _assemble(values | {"service_links": tuple(sorted(service_links(environ)))}, origins)


def _read_options(sources: Sources, origins: dict[str, str]) -> dict[str, Any]:
    """Values by path in the model; an option that has a problem is left out."""
    values: dict[str, Any] = {}
    for option in OPTIONS:
        try:
            raw = sources.find(option) or _default(option)
            values[option.path] = _parse(option, raw) if raw.name != option.file_variable else _of_file(option, sources)
            origins[option.variable] = raw.origin
        except ProblemError as problem:
            sources.problems.append(str(problem))
    return values


def _of_file(option: Option, sources: Sources) -> Secret:
    """A secret that is read from its file now, and that can be read again."""

    def read() -> Secret:
        value = _parse(option, sources.secret_in_file(option))
        return Secret(value.reveal(), read)

    return read()


def _default(option: Option) -> Raw:
    if option.default is None:
        raise ProblemError(f"{option.variable} is missing. {option.fix}")
    return Raw(option.default, option.variable, "default")


def _parse(option: Option, raw: Raw) -> Any:  # noqa: ANN401 -- the value of a field
    try:
        return parse(option.hint, raw.text)
    except ValueError as error:
        value = "is refused" if option.secret else f"is '{shown(raw.text)}'"
        fault = str(error) or f"it is not {option.wants}"
        raise ProblemError(f"{raw.name} {value}: {fault}. {option.fix}") from None


def _read_remotes(sources: Sources, origins: dict[str, str]) -> tuple[str, ...]:
    """The remote ids in their order, without those that have a problem."""
    names: dict[str, str] = {}
    before = len(sources.problems)
    for position, raw in enumerate(sources.find_remotes(), 1):
        try:
            validate_pattern(raw.text)
        except ValueError as error:
            sources.problems.append(f"{raw.name} is '{shown(raw.text)}': {error}. {_REMOTE_FIX}")
            continue
        if raw.text in names:
            sources.problems.append(f"{raw.name} is '{raw.text}', as {names[raw.text]} is. Remove one of them.")
            continue
        names[raw.text] = raw.name
        origins[raw.name if raw.origin == ENVIRONMENT else f"{REMOTE_PREFIX}{position}"] = raw.origin
    if not names and len(sources.problems) == before and not sources.find_peers():
        sources.problems.append(f"{REMOTE_PREFIX}1 is missing. {_REMOTE_FIX}")
    return tuple(names)


def _with_peers(listed: tuple[str, ...], peers: Mapping[str, PeerSettings], local_id: str | None) -> tuple[str, ...]:
    """The listed remote ids, and the peers that none of them includes."""
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
    if not 1 <= len(pattern) <= _MAX_IDENTITY_PATTERN or not pattern.isprintable():
        raise ValueError(f"the pattern has not 1 to {_MAX_IDENTITY_PATTERN} printable characters")
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ValueError("it is not a list of remote system ids")
    return tuple(map(validate_pattern, value))


def _check_together(values: Mapping[str, Any]) -> Iterator[str]:
    """What only several settings together show."""
    match values:
        case {"key_ttl_seconds": ttl, "epoch_seconds": epoch} if ttl > epoch * _MAX_LIVE_EPOCHS:
            yield (
                f"SKIP_EPOCH_SECONDS is {epoch}, so that a key's lifetime of {ttl} s spans more than"
                f" {_MAX_LIVE_EPOCHS} epochs. Set it to {-(-ttl // _MAX_LIVE_EPOCHS)} or more."
            )
    match values:
        case {"max_batch": batch, "max_queue": queue} if batch > queue:
            yield (
                f"SKIP_MAX_QUEUE is {queue}, less than SKIP_MAX_BATCH, {batch}: a batch could never fill."
                f" Set it to {batch} or more."
            )
    match values:
        case {"port": port, "metrics_port": metrics, "api_workers": workers} if metrics:
            # Each api worker serves its metrics on a port of its own, counted up from the first.
            if metrics <= port < metrics + workers:
                yield f"SKIP_METRICS_PORT takes port {port} too, which is SKIP_PORT. Set it to another port."
            if metrics + workers - 1 > 65535:
                yield f"SKIP_METRICS_PORT is {metrics}: {workers} workers need {workers} ports. Set it lower."
    match values:
        case {"tls.cert_files": certs, "tls.key_files": keys}:
            yield from _check_tls(values, len(certs), len(keys))


def _check_tls(values: Mapping[str, Any], certs: int, keys: int) -> Iterator[str]:
    if certs != keys:
        yield (
            f"SKIP_TLS_CERT_FILE names {certs} files and SKIP_TLS_KEY_FILE {keys}."
            " Name one private key for each certificate chain, in the same order."
        )
    if values.get("tls.client_ca_files") and not certs:
        yield "SKIP_TLS_CLIENT_CA_FILE is set without SKIP_TLS_CERT_FILE. Set both, or remove it."
    match values:
        case {"port": port, "tls.port": tls, "tls.psk_files": files} if port == tls and (certs or files):
            yield f"SKIP_TLS_PORT is {tls}, as SKIP_PORT is. Set it to another port."


def _assemble(values: dict[str, Any], origins: dict[str, str]) -> Settings:
    if values["debug"]:
        values["log_level"] = "debug"
        origins["SKIP_LOG_LEVEL"] = "SKIP_DEBUG"
    parts = {name: _part(values, name) for name in ("mysql", "tls")}
    whole = {path: value for path, value in values.items() if "." not in path}
    return Settings(mysql=MySqlSettings(**parts["mysql"]), tls=TlsSettings(**parts["tls"]), origins=origins, **whole)


def _part(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    prefix = f"{name}."
    return {path.removeprefix(prefix): value for path, value in values.items() if path.startswith(prefix)}
