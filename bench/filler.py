"""Fills the store with real keys, sealed and committed by the api's own code, many in one commit.

It acts as the api of the source would, with the source's keyring; the KP's processes need not know.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from sandbox.key_provider import KeyProvider
from sandbox.mariadb import Database
from sandbox.processes import SandboxError
from skipbus.services.api.links import IssuedKey, IssueRequest
from skipbus.services.api.links.sealing import Sealer
from skipbus.services.api.links.store import IssueBatch
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol.system_ids import RemoteSystemIds
from skipbus.shared.store.engine import driver_errors, make_engine

_BATCH = 1000
_KEY_TTL_SECONDS = 3600


class Filler:
    """Issues keys of one KP for another."""

    def __init__(self, database: Database, source: KeyProvider, target: KeyProvider) -> None:
        mysql = database.settings
        self._target_id = target.system_id
        self._engine = make_engine(mysql)
        keyring = Keyring.open(source.keyring_dir, source.system_id)
        remote_ids = RemoteSystemIds([target.system_id])
        self._directory = PeerDirectory(self._engine, source.system_id, remote_ids, keyring.pins, {})
        self._sealer = Sealer(source.system_id, keyring.identity, self._directory)

    def fill(self, count: int, expires_at: float | None = None) -> list[str]:
        """Puts `count` keys into the store; their keyIds. `expires_at` is Unix time in seconds.

        Raises SandboxError when the target cannot be sealed to.
        """
        self._directory.refresh(now_ms())
        key_ids: list[str] = []
        while len(key_ids) < count:
            key_ids += self._fill_batch(min(_BATCH, count - len(key_ids)), _ttl_seconds(expires_at))
        return key_ids

    def close(self) -> None:
        self._engine.dispose()

    def _fill_batch(self, count: int, ttl_seconds: int) -> list[str]:
        requests = [IssueRequest(self._target_id, 256, "bench")] * count
        with driver_errors(), self._engine.connect() as connection:
            answers = IssueBatch(self._sealer, ttl_seconds, requests).run(connection)
            connection.commit()
        return _key_ids(answers)


def _key_ids(answers: Sequence[IssuedKey | Exception]) -> list[str]:
    key_ids = []
    for answer in answers:
        if not isinstance(answer, IssuedKey):
            raise SandboxError(f"the store cannot be filled: {answer}")
        key_ids.append(answer.key_id)
    return key_ids


def _ttl_seconds(expires_at: float | None) -> int:
    return _KEY_TTL_SECONDS if expires_at is None else max(1, round(expires_at - time.time()))
