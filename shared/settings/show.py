"""Shows settings: what a process would run with, its problems, `--help`, and the arguments that every service takes.

Rules: secrets show as `***`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from operator import attrgetter

from skipbus.shared.settings.load import ConfigurationError, load_settings
from skipbus.shared.settings.model import CONFIG_FILE, OPTIONS, REMOTE_PREFIX, Settings, remote_number
from skipbus.shared.settings.peers import describe_peer
from skipbus.shared.settings.sources import ENVIRONMENT
from skipbus.shared.settings.values import NO_FILE

EXIT_BAD_CONFIGURATION = 2


def describe(settings: Settings) -> list[tuple[str, str, str]]:
    """The effective configuration: name, value and origin of everything."""
    from_toml = f"TOML {settings.config_file}"
    values = {option.variable: _shown(attrgetter(option.path)(settings)) for option in OPTIONS}
    # The ids that only a table of a peer names come after the listed ones, and are shown with the peers.
    remotes = [name for name in settings.origins if remote_number(name)]
    values |= dict(zip(remotes, settings.remote_system_ids, strict=False))
    lines = [(name, value, settings.origins[name]) for name, value in values.items()]
    for pattern, allowed in settings.tls.identities.items():
        lines.append((f'identities."{pattern}"', ", ".join(allowed) or NO_FILE, from_toml))
    lines.extend((f'peers."{peer.system_id}"', describe_peer(peer), from_toml) for peer in settings.peers.values())
    if settings.config_file is not None:
        lines.insert(0, (CONFIG_FILE, settings.config_file, ENVIRONMENT))
    return lines


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or NO_FILE
    return str(value).lower() if isinstance(value, bool) else str(value)


def describe_text(settings: Settings) -> str:
    """`describe` as aligned lines for a terminal."""
    lines = describe(settings)
    width = max(len(name) for name, _, _ in lines)
    return "".join(f"{name:<{width}} = {value}  ({origin})\n" for name, value, origin in lines)


def problems_text(error: ConfigurationError, program: str) -> str:
    """All problems, one in each line."""
    count = len(error.problems)
    head = f"{program}: the configuration has {count} problem{'s' if count > 1 else ''}:\n"
    return head + "".join(f"  {problem}\n" for problem in error.problems)


def load_settings_or_exit(environ: Mapping[str, str], program: str) -> Settings:
    """`load_settings`; if that fails, prints every problem on stderr and exits with code 2."""
    try:
        return load_settings(environ)
    except ConfigurationError as error:
        sys.stderr.write(problems_text(error, program))
        raise SystemExit(EXIT_BAD_CONFIGURATION) from None


def config_from_argv(program: str, argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """The settings for a service's `main`; `argv` is without the program's own name.

    Exits with 0 after `--check-config`, `--help` and `--version`, with 2 for a bad configuration or argument.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description="Configured by environment variables and an optional TOML file, not by arguments.",
        epilog="".join(f"{name}\n    {text}\n" for name, text in _variables()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check-config", action="store_true", help="print what would run, and exit with 0 or 2")
    parser.add_argument("--version", action="version", version=f"{program} {project_version()}")
    arguments = parser.parse_args(argv)
    settings = load_settings_or_exit(environ, program)
    if arguments.check_config:
        sys.stdout.write(f"{program} {project_version()} would run with:\n{describe_text(settings)}")
        raise SystemExit(0)
    return settings


def _variables() -> Iterator[tuple[str, str]]:
    for option in OPTIONS:
        default = "required" if option.default is None else f"default {option.default}"
        name = f"{option.variable}, {option.file_variable}" if option.secret else option.variable
        yield name, f"{option.help}: {option.wants} ({default})"
    yield f"{REMOTE_PREFIX}1..n", "ids, or globs of ids, of the key providers at the other ends (one is required)"
    yield CONFIG_FILE, "a TOML file for what is not set by variables; secrets must not be in it"


def project_version() -> str:
    """The installed distribution's version."""
    try:
        return metadata.version("skipbus")
    except metadata.PackageNotFoundError:
        return "0+unknown"
