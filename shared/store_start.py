"""What a process does about the store's schema at its start: one look, and a migration only where one is needed.

Alembic is loaded for the migration alone: loading it takes a fifth of a process's start.
"""

from __future__ import annotations

from pymysql.constants import ER
from sqlalchemy import Connection, text
from sqlalchemy.exc import ProgrammingError

from skipbus.shared.config import MySqlSettings
from skipbus.shared.database import driver_errors, make_engine
from skipbus.shared.logs import get_logger

# The revision that this release needs, as skipbus.shared.migrations has it; a test compares them.
HEAD_REVISION = "0002"

_log = get_logger("migrate")


def bring_up_to_date(mysql: MySqlSettings) -> None:
    """Migrates where that is needed, and uses a newer store as it is. Raises StoreUnavailable, StoreRefused."""
    revision, flush_at_commit = _look(mysql)
    if revision != HEAD_REVISION:
        _migrate(mysql)
    # "Answered means retrievable" and "given out once" rest on commits that survive a crash of the server.
    if flush_at_commit != 1:
        _log.warning(
            "store is not durable",
            reason=f"innodb_flush_log_at_trx_commit is {flush_at_commit}: a crash of the server can lose or give out "
            "keys twice; set it to 1",
        )


def _look(mysql: MySqlSettings) -> tuple[str | None, int]:
    """The store's revision, None for a store that was never migrated, and when it flushes its log."""
    engine = make_engine(mysql, pool_size=1)
    try:
        with driver_errors(), engine.connect() as connection:
            flush_at_commit = connection.execute(text("SELECT @@GLOBAL.innodb_flush_log_at_trx_commit")).scalar_one()
            return _revision(connection), int(flush_at_commit)
    finally:
        engine.dispose()


def _revision(connection: Connection) -> str | None:
    try:
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    except ProgrammingError as error:
        if error.orig is not None and error.orig.args[0] == ER.NO_SUCH_TABLE:
            return None
        raise


def _migrate(mysql: MySqlSettings) -> None:
    from skipbus.shared import migrate  # noqa: PLC0415 -- see above

    try:
        if migrate.upgrade_store(mysql):
            _log.info("store migrated", revision=HEAD_REVISION)
    except migrate.StoreNewer as error:
        _log.warning("store is newer", reason=str(error))
