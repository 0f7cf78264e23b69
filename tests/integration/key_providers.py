"""Key providers over one migrated store, without their processes: for tests of what the processes are made of.

Owns how a test comes by settings, keyrings, announcements, and raw queries of the store. The parts are the real
ones; only the clock of what takes the time as an argument is the test's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pymysql.connections import Connection
from sqlalchemy import Engine

from sandbox.mariadb import Database
from skipbus.services.api.group_commit import Batch
from skipbus.services.api.links import ClaimedKey, IssuedKey, IssueRequest
from skipbus.services.api.links.sealing import Opener, Sealer
from skipbus.services.api.links.store import ClaimBatch, ClaimRequest, IssueBatch
from skipbus.services.janitor.epochs import EpochKeeper
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.errors import SkipbusError
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol.system_ids import RemoteSystemIds
from skipbus.shared.settings import Settings, load_settings
from skipbus.shared.store.announcements import fetch_announcement_digest
from skipbus.shared.store.engine import connect, driver_errors, make_engine, make_queue_engine
from skipbus.shared.store.migrate import bring_up_to_date
from skipbus.shared.store.schema import METADATA

Answer = TypeVar("Answer")


def settings_for(database: Database, system_id: str, keyring_dir: Path, **environ: str) -> Settings:
    """Settings as a process of ``system_id`` would have them; every other KP may be its peer."""
    return load_settings(
        {
            "SKIP_LOCAL_SYSTEM_ID": system_id,
            "SKIP_REMOTE_SYSTEM_ID_1": "KP_*",
            "SKIP_KEYRING_DIR": str(keyring_dir),
            "MYSQL_HOST": database.host,
            "MYSQL_PORT": str(database.port),
            "MYSQL_USER": database.user,
            "MYSQL_PASSWORD": database.password,
            "MYSQL_DATABASE": database.database,
            **environ,
        }
    )


class Store:
    """One test's store, migrated; closes what was opened through it."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.folder = folder
        self.settings = settings_for(database, "KP_Test", folder / "none")
        bring_up_to_date(self.settings.mysql)
        self.engine = make_engine(self.settings.mysql)

    def empty(self) -> None:
        """Takes all rows out of all tables."""
        with self.connect() as connection, connection.cursor() as cursor:
            # A transaction that a test left open is an error, and not a long wait.
            cursor.execute("SET SESSION lock_wait_timeout = 5")
            for table in METADATA.tables:
                cursor.execute(f"SELECT 1 FROM {table} LIMIT 1")
                if cursor.fetchone() is not None:
                    cursor.execute(f"TRUNCATE TABLE {table}")

    def close(self) -> None:
        """Gives its connections back."""
        self.engine.dispose()

    @contextmanager
    def without_table(self, name: str) -> Iterator[None]:
        """The store refuses every statement on this table while the block runs."""
        self.rows(f"RENAME TABLE {name} TO elsewhere")
        try:
            yield
        finally:
            self.rows(f"RENAME TABLE elsewhere TO {name}")

    def key_provider(self, system_id: str, **environ: str) -> KeyProvider:
        """A new KP with its own keyring, announced in this store."""
        return KeyProvider(self, system_id, environ)

    def connect(self) -> closing[Connection[Any]]:
        """A raw connection of the driver."""
        return closing(connect(self.settings.mysql))

    def rows(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """What a statement finds or, for one that changes something, nothing; committed."""
        with self.connect() as connection, connection.cursor() as cursor:
            cursor.execute(statement, parameters or None)
            rows = list(cursor.fetchall())
            connection.commit()
            return rows

    def count(self, table: str) -> int:
        """How many rows a table has."""
        return int(self.rows(f"SELECT COUNT(*) FROM {table}")[0][0])


def tend(keeper: EpochKeeper, at_ms: int, *, list_files: bool = True) -> None:
    """What a janitor does each second: keeps the epochs, and announces what the store has not."""
    keeper.tend(at_ms, list_files=list_files)
    with driver_errors(), keeper._engine.connect() as connection:
        digest = fetch_announcement_digest(connection, keeper._settings.local_system_id)
    keeper.announce(at_ms, digest)


class KeyProvider:
    """One KP's parts. ``refresh`` makes it read the store, as its api does every second."""

    def __init__(self, store: Store, system_id: str, environ: dict[str, str]) -> None:
        self.store = store
        self.system_id = system_id
        folder = store.folder / f"keyring-{system_id}"
        self.settings = settings_for(store.database, system_id, folder, **environ)
        self.keyring = Keyring.create(folder, system_id)
        self.engine: Engine = store.engine
        self.keeper = EpochKeeper(self.settings, self.engine, self.keyring)
        remote_ids = RemoteSystemIds([*self.settings.remote_system_ids, system_id], system_id)
        self.directory = PeerDirectory(self.engine, system_id, remote_ids, self.keyring.pins, {})
        tend(self.keeper, now_ms())
        self.sealer = Sealer(system_id, self.keyring.identity, self.directory)
        self.opener = Opener(self.keyring, self.directory)

    def refresh(self) -> None:
        """Takes in what other KPs have announced."""
        self.directory.refresh(now_ms())

    def issue_batch(self, requests: Sequence[IssueRequest]) -> IssueBatch:
        """A batch as the api's queue of issues makes it."""
        return IssueBatch(self.sealer, self.settings.key_ttl_seconds, requests)

    def claim_batch(self, requests: Sequence[ClaimRequest]) -> ClaimBatch:
        """A batch as the api's queue of claims makes it."""
        return ClaimBatch(self.opener, requests)

    def commit(self, batch: Batch[Answer], engine: Engine | None = None) -> Sequence[Answer | SkipbusError]:
        """Runs a batch in a transaction of its own, as a queue does. Raises the store's errors as ours."""
        with driver_errors(), (engine or self.engine).connect() as connection:
            answers = batch.run(connection)
            connection.commit()
            return answers

    def issue(self, target: KeyProvider | str, count: int = 1, size_bits: int = 256) -> list[IssuedKey]:
        """Keys for ``target``, placed in one commit."""
        name = target if isinstance(target, str) else target.system_id
        requests = [IssueRequest(name, size_bits, f"issue-{n}") for n in range(count)]
        answers = self.commit(self.issue_batch(requests))
        return [answer for answer in map(_or_raise, answers) if isinstance(answer, IssuedKey)]

    def claim(self, key_id: str | bytes, source: KeyProvider | str) -> ClaimedKey:
        """The key, once. Raises what the caller would get."""
        name = source if isinstance(source, str) else source.system_id
        wanted = bytes.fromhex(key_id) if isinstance(key_id, str) else key_id
        (answer,) = self.commit(self.claim_batch([ClaimRequest(wanted, name, "claim")]))
        claimed = _or_raise(answer)
        assert isinstance(claimed, ClaimedKey)
        return claimed

    def restarted(self) -> KeyProvider:
        """Forgets what is only in memory, as a new api process would."""
        self.sealer = Sealer(self.system_id, self.keyring.identity, self.directory)
        self.opener = Opener(self.keyring, self.directory)
        return self


def announced(store: Store, *system_ids: str, **environ: str) -> list[KeyProvider]:
    """KPs that all know of each other."""
    providers = [store.key_provider(system_id, **environ) for system_id in system_ids]
    for provider in providers:
        provider.refresh()
    return providers


def queue_engine(settings: Settings, port: int | None = None) -> Engine:
    """An engine as the api's queues have it, by another port if one is given."""
    return make_queue_engine(replace(settings.mysql, port=port or settings.mysql.port))


def _or_raise(answer: object) -> object:
    if isinstance(answer, SkipbusError):
        raise answer
    return answer
