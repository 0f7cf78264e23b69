"""Owns what a module of skipctl has to offer, and how it adds its commands.

Rules: a module has `register(commands)`, which adds one command with `add_group`, and its subcommands with
`add_command`. A handler gets the parsed arguments and the environment, prints to stdout and returns the
exit code; it raises errors of `skipbus.shared.errors` and prints none of them.
Leaves to others: turning errors into sentences and exit codes (`skipbus.ctl.__main__`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TypeAlias

Handler: TypeAlias = Callable[[argparse.Namespace, Mapping[str, str]], int]
# argparse has no public name for what `add_subparsers` returns.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001


def add_group(commands: Commands, name: str, help_text: str) -> Commands:
    """Add the command `name`, which does nothing without one of the subcommands added to the answer."""
    group = commands.add_parser(name, help=help_text, description=help_text)
    return group.add_subparsers(metavar="COMMAND", required=True, title="commands")


def add_command(commands: Commands, name: str, help_text: str, handler: Handler) -> argparse.ArgumentParser:
    """Add the command `name`, done by `handler`. Arguments are added to the parser in the answer."""
    parser = commands.add_parser(name, help=help_text, description=help_text)
    parser.set_defaults(handler=handler)
    return parser
