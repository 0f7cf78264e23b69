"""Brings the store's schema up to this release, by Alembic, under a lease.

Any number of processes may start at once: one migrates, the others wait and find nothing left to do. A store that is
at the current revision is only read, so accounts without the right to change tables can start. A store that is *newer*
is left alone and used: within a major release migrations only add.
Alembic is imported where it is needed: it takes a fifth of a process's start, and most starts migrate nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

from pymysql.constants import ER
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.schema import CreateTable
from tenacity import RetryCallState, Retrying, retry_if_result, stop_after_delay, wait_fixed

from skipbus.shared.errors import BackendError, OperatorError, StoreUnavailable
from skipbus.shared.logging import get_logger
from skipbus.shared.settings import MySqlSettings
from skipbus.shared.store.election import Election
from skipbus.shared.store.engine import driver_errors, make_engine
from skipbus.shared.store.schema import LEASES

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

# The newest revision in migrations/; a test compares them.
HEAD_REVISION = "0003"
_SCRIPTS = Path(__file__).parent / "migrations"
_LEASE_WAIT_SECONDS = 60
_LEASE_POLL_SECONDS = 0.2
_LEASE_SILENCE_SECONDS = 30

_log = get_logger("migrate")


class StoreNewer(OperatorError):
    """The store has a revision that this release does not know."""


def bring_up_to_date(mysql: MySqlSettings) -> None:
    """What a process does at its start: migrates where that is needed, and uses a newer store as it is.

    Raises StoreUnavailable or StoreRefused.
    """
    revision, flush_at_commit = _revision_and_durability(mysql)
    if revision != HEAD_REVISION:
        try:
            if upgrade_store(mysql):
                _log.info("store migrated", revision=head_revision())
        except StoreNewer as error:
            _log.warning("store is newer", reason=str(error), effect="keys are served; upgrade this process")
    # "Answered means retrievable" and "given out once" rest on commits that survive a crash of the server.
    if flush_at_commit != 1:
        _log.warning(
            "store is not durable",
            reason=f"innodb_flush_log_at_trx_commit is {flush_at_commit}: a crash of the server can lose or give out "
            "keys twice; set it to 1",
        )


def store_revision(mysql: MySqlSettings) -> str | None:
    """The store's revision, None for an empty one. Raises StoreUnavailable or StoreRefused."""
    return _revision_and_durability(mysql)[0]


def head_revision() -> str | None:
    """The newest of the migrations that are installed here. Reads files."""
    return _scripts().get_current_head()


def is_known(revision: str | None) -> bool:
    """Whether this release has the revision among its migrations."""
    known = {script.revision for script in _scripts().walk_revisions()}
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
    engine = make_engine(mysql)
    try:
        with driver_errors():
            with engine.begin() as connection:
                connection.execute(CreateTable(LEASES, if_not_exists=True))
            with _migration_lease(engine), engine.connect() as connection:
                return _upgrade(connection)
    finally:
        engine.dispose()


def _upgrade(connection: Connection) -> bool:
    from alembic import command  # noqa: PLC0415 -- the module's docstring says why

    before = _fetch_revision(connection)
    command.upgrade(_config(connection), "head")
    connection.commit()
    return before != head_revision()


def _revision_and_durability(mysql: MySqlSettings) -> tuple[str | None, int]:
    """The store's revision, and its innodb_flush_log_at_trx_commit."""
    engine = make_engine(mysql, pool_size=1)
    try:
        with driver_errors(), engine.connect() as connection:
            flush_at_commit = connection.execute(text("SELECT @@GLOBAL.innodb_flush_log_at_trx_commit")).scalar_one()
            return _fetch_revision(connection), int(flush_at_commit)
    finally:
        engine.dispose()


def _fetch_revision(connection: Connection) -> str | None:
    try:
        return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    except ProgrammingError as error:
        if error.orig is not None and error.orig.args[0] == ER.NO_SUCH_TABLE:
            return None
        raise


def _config(connection: Connection | None = None) -> Config:
    from alembic.config import Config  # noqa: PLC0415 -- the module's docstring says why

    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS))
    config.attributes["connection"] = connection
    return config


def _scripts() -> ScriptDirectory:
    from alembic.script import ScriptDirectory  # noqa: PLC0415 -- the module's docstring says why

    return ScriptDirectory.from_config(_config())


@contextlib.contextmanager
def _migration_lease(engine: Engine) -> Iterator[None]:
    """Waits for the lease of migrations, and renews it until the block ends. Raises StoreUnavailable after a minute."""
    # Statements that change tables commit, so no transaction could keep two migrations apart; and a cluster holds back
    # all other statements while they run, a renewal too.
    election = Election(engine, "migration", silence_seconds=_LEASE_SILENCE_SECONDS)
    done = Event()
    renewals = Thread(target=_renew, args=(election, done), name="migration lease", daemon=True)
    wait_for_lease = Retrying(
        retry=retry_if_result(lambda elected: not elected),
        wait=wait_fixed(_LEASE_POLL_SECONDS),
        stop=stop_after_delay(_LEASE_WAIT_SECONDS),
        retry_error_callback=_raise_busy,
    )
    wait_for_lease(election.tick)
    renewals.start()
    try:
        yield
    finally:
        done.set()
        renewals.join()
        election.release()


def _renew(election: Election, done: Event) -> None:
    while not done.wait(1.0):
        with contextlib.suppress(BackendError):
            election.tick()


def _raise_busy(_state: RetryCallState) -> bool:
    raise StoreUnavailable(f"another process has been migrating the store for {_LEASE_WAIT_SECONDS} s")
