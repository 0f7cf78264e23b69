"""``skipctl config``: the effective configuration of the services, with secrets as `***`, and the page about it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from skipbus.ctl.command import Commands, add_command, add_group
from skipbus.ctl.config_page import configuration_page
from skipbus.shared.settings import describe_text, load_settings


def register(commands: Commands) -> None:
    """Add `config` and its subcommands."""
    group = add_group(commands, "config", "show the configuration")
    add_command(group, "check", "print the effective configuration, with secrets hidden", check)
    add_command(group, "markdown", "print the page docs/configuration.md", markdown)


def check(_arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Print each option with its value and its origin. Raises `ConfigurationError`."""
    print(describe_text(load_settings(environ)), end="")
    return 0


def markdown(_arguments: argparse.Namespace, _environ: Mapping[str, str]) -> int:
    """Print the page that describes every setting."""
    print(configuration_page(), end="")
    return 0
