"""Brings the store's schema up to this release, by Alembic, under a MySQL lock.

Any number of processes may start at once: one migrates, the others wait and find nothing left to do. A
store that is at the current revision is only read, so accounts without the right to change tables can start.
A store that is *newer* is left alone and used: within a major release migrations only add. What a process does
at its start, mostly without this module, is in skipbus.shared.store_start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from skipbus.shared.config import MySqlSettings
from skipbus.shared.database import driver_errors, make_engine
from skipbus.shared.errors import OperatorError, StoreUnavailable

_SCRIPTS = Path(__file__).parent / "migrations"
_LOCK_WAIT_SECONDS = 60


class StoreNewer(OperatorError):
    """The store has a revision that this release does not know."""


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS))
    config.attributes["connection"] = connection
    return config


def head_revision() -> str:
    """The revision that this release needs."""
    return str(ScriptDirectory.from_config(_config()).get_current_head())


def store_revision(mysql: MySqlSettings) -> str | None:
    """The store's revision, None for an empty one. Raises StoreUnavailable or StoreRefused."""
    engine = make_engine(mysql, pool_size=1)
    try:
        with driver_errors(), engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()
    finally:
        engine.dispose()


def is_known(revision: str | None) -> bool:
    """Whether this release has the revision among its migrations."""
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    return revision is None or revision in known


def upgrade_store(mysql: MySqlSettings) -> bool:
    """Migrates the store to the head revision; whether there was anything to do.

    Raises StoreUnavailable, StoreRefused, or StoreNewer (the store may be used all the same).
    """
    found = store_revision(mysql)
    if found == head_revision():
        return False
    if not is_known(found):
        raise StoreNewer(f"the store has the schema of a newer release (revision {found})")
    engine = make_engine(mysql, pool_size=1)
    try:
        with driver_errors(), engine.connect() as connection, _migration_lock(connection, mysql.database):
            before = MigrationContext.configure(connection).get_current_revision()
            command.upgrade(_config(connection), "head")
            connection.commit()
            return before != head_revision()
    finally:
        engine.dispose()


@contextlib.contextmanager
def _migration_lock(connection: Connection, database: str) -> Iterator[None]:
    # Statements that change tables commit, so no transaction could keep two migrations apart: a lock does.
    name = f"skipbus:migrate:{database}"[:64]
    lock = {"name": name, "seconds": _LOCK_WAIT_SECONDS}
    # Below the connection's own read timeout, so that waiting is not mistaken for a dead server.
    for _ in range(_LOCK_WAIT_SECONDS // 5):
        if connection.execute(text("SELECT GET_LOCK(:name, 5)"), lock).scalar() == 1:
            break
    else:
        raise StoreUnavailable(f"another process has been migrating the store for {_LOCK_WAIT_SECONDS} s")
    try:
        connection.commit()
        yield
    finally:
        with contextlib.suppress(Exception):  # the lock goes with the connection in any case
            connection.execute(text("SELECT RELEASE_LOCK(:name)"), lock)
