"""skipctl: the operator's commands for one key provider.

Owns the list of commands and the exit codes: an error of the error tree is one sentence and exit code 1; a wrong
configuration is all its problems and exit code 2, like a wrong argument. Each command is in the module of its name,
and only the requested module is imported, because the store's modules take half of the start.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import cast

from skipbus.ctl.command import Handler
from skipbus.shared.errors import SkipbusError
from skipbus.shared.settings import ConfigurationError, problems_text, project_version

_PROGRAM = "skipctl"
_COMMANDS = ("config", "db", "keyring", "identity", "peer", "psk", "cert", "site")


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    arguments = _parser(words[0] if words else "").parse_args(words)
    handler = cast(Handler, arguments.handler)
    try:
        return handler(arguments, os.environ if environ is None else environ)
    except ConfigurationError as error:
        sys.stderr.write(problems_text(error, _PROGRAM))
        return 2
    except SkipbusError as error:
        sys.stderr.write(f"{_PROGRAM}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


def _parser(command: str) -> argparse.ArgumentParser:
    """A parser for the requested command only; if there is no such command, for all, so that help lists them."""
    parser = argparse.ArgumentParser(prog=_PROGRAM, description="Commands for the operator of one key provider.")
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {project_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for name in (command,) if command in _COMMANDS else _COMMANDS:
        import_module(f"skipbus.ctl.{name}").register(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
