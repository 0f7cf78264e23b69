"""``skipctl db upgrade|status|provision``: the store's schema, and the services' accounts.

Processes upgrade a store by themselves if their account may; these commands do it at a chosen time.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from skipbus.ctl.provision import add_provision
from skipbus.shared.settings import load_settings
from skipbus.shared.store.migrate import HEAD_REVISION, is_known, store_revision, upgrade_store


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser("db", help="upgrade the store's schema, and make the services' accounts")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("upgrade", help="bring the store up to this release").set_defaults(handler=_upgrade)
    commands.add_parser("status", help="compare the store with this release; exit code 1 if they differ").set_defaults(
        handler=_status
    )
    add_provision(commands.add_parser("provision", help="upgrade it, and give each service its account and grants"))


def _upgrade(_arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    settings = load_settings(environ)
    changed = upgrade_store(settings.mysql)
    print(f"the store is at revision {HEAD_REVISION}" + ("" if changed else " already"))
    return 0


def _status(_arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    settings = load_settings(environ)
    found, wanted = store_revision(settings.mysql), HEAD_REVISION
    print(f"store    {found or 'empty'}")
    print(f"release  {wanted}")
    if found == wanted:
        return 0
    print("run 'skipctl db upgrade'" if is_known(found) else "the store belongs to a newer release")
    return 1
