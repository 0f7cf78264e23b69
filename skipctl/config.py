"""``skipctl config check``: prints the effective configuration of the services, with secrets as `***`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from skipbus.ctl.command import Commands, add_command, add_group
from skipbus.shared.config import describe_text, load_settings


def register(commands: Commands) -> None:
    """Add `config` and its subcommands."""
    group = add_group(commands, "config", "show the configuration")
    add_command(group, "check", "print the effective configuration, with secrets hidden", check)


def check(_arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Print each option with its value and its origin. Raises `ConfigurationError`."""
    print(describe_text(load_settings(environ)), end="")
    return 0
