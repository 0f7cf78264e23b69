"""``skipctl db upgrade|status|provision``: the store's schema, and the services' accounts.

Processes upgrade a store by themselves if their account may; these commands do it at a chosen time.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from skipbus.ctl.command import Commands, add_command, add_group
from skipbus.ctl.provision import add_provision
from skipbus.shared.settings import load_settings
from skipbus.shared.store.migrate import head_revision, is_known, store_revision, upgrade_store


def register(commands: Commands) -> None:
    """Adds `db` and its subcommands."""
    group = add_group(commands, "db", "upgrade the store's schema, and make the services' accounts")
    add_command(group, "upgrade", "bring the store up to this release", _upgrade)
    add_command(group, "status", "compare the store with this release; exit code 1 if they differ", _status)
    add_provision(group)


def _upgrade(_arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    settings = load_settings(environ)
    changed = upgrade_store(settings.mysql)
    print(f"the store is at revision {head_revision()}" + ("" if changed else " already"))
    return 0


def _status(_arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    settings = load_settings(environ)
    found, wanted = store_revision(settings.mysql), head_revision()
    print(f"store    {found or 'empty'}")
    print(f"release  {wanted}")
    if found == wanted:
        return 0
    print("run 'skipctl db upgrade'" if is_known(found) else "the store belongs to a newer release")
    return 1
