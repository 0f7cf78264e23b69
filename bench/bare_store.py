"""The yardsticks for the store: rows of the shape of `key_records`, put in by a bare loop, each commit durable.

What is in the rows is random, so that the indexes grow as those of keys do. Nothing is sealed here.
"""

from __future__ import annotations

import os
import time

from sandbox.mariadb import Database

_TABLE = "bench_records"
_BATCH = 64
_COLUMNS = "target_id, expires_ms, key_id, source_id, size_bits, wrapping_key_id, nonce, sealed, correlation_id"
_KEY_TTL_MS = 3_600_000


class BareStore:
    """One connection and a table of its own beside the store's."""

    def __init__(self, database: Database) -> None:
        self._connection = database.connect(autocommit=False)
        self._execute(f"DROP TABLE IF EXISTS {_TABLE}")
        self._execute(f"CREATE TABLE {_TABLE} LIKE key_records")

    def batched_rows_per_second(self, seconds: float) -> float:
        """Rows in a second when 64 of them share a statement and a commit."""
        started = time.monotonic()
        rows = 0
        while time.monotonic() - started < seconds:
            self._insert(_BATCH)
            rows += _BATCH
        took_seconds = time.monotonic() - started
        self._clear()
        return rows / took_seconds

    def single_row_times_us(self, count: int) -> list[float]:
        """How long each INSERT of one row took with its COMMIT."""
        times_us = []
        for _ in range(count):
            started = time.perf_counter()
            self._insert(1)
            times_us.append((time.perf_counter() - started) * 1e6)
        self._clear()
        return times_us

    def close(self) -> None:
        self._execute(f"DROP TABLE {_TABLE}")
        self._connection.close()

    def _insert(self, rows: int) -> None:
        expires_ms = time.time_ns() // 1_000_000 + _KEY_TTL_MS
        values = ",".join(_row(expires_ms) for _ in range(rows))
        self._execute(f"INSERT INTO {_TABLE} ({_COLUMNS}) VALUES {values}")
        self._connection.commit()

    def _clear(self) -> None:
        self._execute(f"TRUNCATE TABLE {_TABLE}")

    def _execute(self, statement: str) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute(statement)


def _row(expires_ms: int) -> str:
    random = os.urandom(92).hex()
    key_id, wrapping_key_id, nonce, sealed = random[:32], random[32:64], random[64:88], random[88:]
    return f"('KP_Bob',{expires_ms},0x{key_id},'KP_Alice',256,0x{wrapping_key_id},0x{nonce},0x{sealed},'{key_id[:16]}')"
