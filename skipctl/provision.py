"""``skipctl db provision``: prepares the store for the services: tables, one account for each service, its grants.

Run it with the administrator's account (MYSQL_USER) before the services, at each new release. It migrates first,
because a grant needs its table. It may run again, also while services run: it only adds, and sets the passwords of the
files. The grants are ``compose/grants/*.sql``. Names that become part of a statement are letters, digits and ``_``; a
password is a parameter.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pymysql.connections import Connection

from skipbus.ctl.command import Commands, add_command
from skipbus.ctl.shipped import read_shipped
from skipbus.shared.errors import OperatorError
from skipbus.shared.settings import Secret, load_settings
from skipbus.shared.settings.values import read_regular_file
from skipbus.shared.store.engine import connect, driver_errors
from skipbus.shared.store.migrate import StoreNewer, head_revision, upgrade_store

# Roles with "bus-" have all rights of the others, and those that bus links need in addition.
ROLES = ("api", "syncer", "janitor", "bus-api", "bus-syncer")
_ACCOUNT = re.compile(rf"([A-Za-z0-9_]{{1,32}})=({'|'.join(ROLES)}):(.+)")


@dataclass(frozen=True)
class Account:
    """An account for one service."""

    name: str
    role: str
    password: Secret


def add_provision(group: Commands) -> None:
    """Adds `provision`."""
    parser = add_command(group, "provision", "upgrade it, and give each service its account and grants", _provision)
    parser.add_argument(
        "accounts", nargs="+", metavar="NAME=ROLE:PASSWORD_FILE", help=f"ROLE is one of {', '.join(ROLES)}"
    )


def _provision(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    mysql = load_settings(environ).mysql
    accounts = [_read_account(text) for text in arguments.accounts]
    try:
        changed = upgrade_store(mysql)
        print(f"the store is at revision {head_revision()}" + ("" if changed else " already"))
    except StoreNewer as error:
        print(f"{error}; it is used as it is")
    connection = connect(mysql)
    try:
        for account in accounts:
            _grant(connection, account, mysql.database)
            print(f"account {account.name}: grants of {account.role}")
    finally:
        connection.close()
    return 0


def _read_account(text: str) -> Account:
    found = _ACCOUNT.fullmatch(text)
    if found is None:
        raise OperatorError(f"{text!r} is not NAME=ROLE:PASSWORD_FILE with a role of {', '.join(ROLES)}")
    path = Path(found[3])
    try:
        password = read_regular_file(str(path))[0].decode().rstrip("\r\n")
    except (OSError, ValueError) as error:
        raise OperatorError(f"{path} cannot be read as a password: {type(error).__name__}") from error
    if not password:
        raise OperatorError(f"{path} is empty")
    return Account(found[1], found[2], Secret(password))


def _grant(connection: Connection, account: Account, database: str) -> None:
    with driver_errors(), connection.cursor() as cursor:
        # The second statement is for an existing account: it gets the password that the service uses.
        for statement in ("CREATE USER IF NOT EXISTS %s@%s IDENTIFIED BY %s", "ALTER USER %s@%s IDENTIFIED BY %s"):
            cursor.execute(statement, (account.name, "%", account.password.reveal()))
        for grants in _grants_of(account.role):
            for statement in statements(grants, f"'{account.name}'@'%'", f"`{database}`"):
                cursor.execute(statement)


def _grants_of(role: str) -> list[str]:
    roles = dict.fromkeys((role.removeprefix("bus-"), role))
    return [read_shipped(f"grants/{name}.sql") for name in roles]


def statements(text: str, account: str, database: str) -> Iterator[str]:
    """The statements of a grants file, for one quoted account and one quoted database."""
    sql = "\n".join(line for line in text.splitlines() if not line.startswith("--"))
    for statement in sql.split(";"):
        if statement.strip():
            yield statement.strip().replace(":account", account).replace(":database", database)
