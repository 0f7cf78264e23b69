"""skipctl: the operator's command line for one key provider.

Owns the list of commands, and what becomes of errors: one of the error tree is one sentence and exit code
1, a configuration that cannot be used is all its problems and exit code 2, as a wrong argument is.
Leaves the commands to the modules in `_MODULES`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import cast

from shared.config import ConfigurationError, problems_text, project_version
from shared.errors import SkipbusError
from skipctl import cert, config, db, identity, keyring, peer, psk, site
from skipctl.command import Handler

_PROGRAM = "skipctl"
_MODULES = (config, db, keyring, identity, peer, psk, cert, site)


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_PROGRAM, description="Look after one key provider.")
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {project_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for module in _MODULES:
        module.register(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
