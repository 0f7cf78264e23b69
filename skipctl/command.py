"""How a module of skipctl adds its commands.

A module has `register(commands)`, which adds one command with `add_group`, and its subcommands with `add_command`. A
handler gets the parsed arguments and the environment, prints to stdout and returns the exit code. It raises errors of
`skipbus.shared.errors`; `skipbus.ctl.__main__` prints them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

Handler: TypeAlias = Callable[[argparse.Namespace, Mapping[str, str]], int]


class Commands(Protocol):
    """What `ArgumentParser.add_subparsers` returns; argparse has no public name for it."""

    def add_parser(self, name: str, *, help: str, description: str) -> argparse.ArgumentParser:  # noqa: A002
        """Adds a command."""


def add_group(commands: Commands, name: str, help_text: str) -> Commands:
    """Adds the command `name`, and returns the object to which its subcommands are added."""
    group = commands.add_parser(name, help=help_text, description=help_text)
    return group.add_subparsers(metavar="COMMAND", required=True, title="commands")


def add_command(commands: Commands, name: str, help_text: str, handler: Handler) -> argparse.ArgumentParser:
    """Adds the command `name`, and returns its parser, to which its arguments are added."""
    parser = commands.add_parser(name, help=help_text, description=help_text)
    parser.set_defaults(handler=handler)
    return parser
