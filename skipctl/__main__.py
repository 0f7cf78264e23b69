"""skipctl: the operator's command line for one key provider.

Owns the list of commands, and what becomes of errors: one of the error tree is one sentence and exit code
1, a configuration that cannot be used is all its problems and exit code 2, as a wrong argument is.
Leaves the commands to the modules of their names. Only the one that is asked for is loaded: half of a start would go
into what only the store's commands need.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import cast

from skipbus.ctl.command import Handler
from skipbus.shared.config import ConfigurationError, problems_text, project_version
from skipbus.shared.errors import SkipbusError

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
    """With one command alone where that is the one; with all where it is none of them, so that help lists them."""
    parser = argparse.ArgumentParser(prog=_PROGRAM, description="Look after one key provider.")
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {project_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for name in (command,) if command in _COMMANDS else _COMMANDS:
        import_module(f"skipbus.ctl.{name}").register(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
