"""Where everything is measured: private servers and two whole key providers, on a disk, over loopback.

The database server commits durably (the sandbox sees to it) and has a buffer pool of 1 GiB. All three processes
of both key providers run. Each item leaves the stage as it found it: no keys, nothing to be sent to peers.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pymysql

from bench.filler import Filler
from bench.machine import file_system_of
from bench.progress import tell
from bench.sites_stage import SitesStage
from sandbox.key_provider import KeyProvider
from sandbox.ports import free_port
from sandbox.processes import SandboxError, wait_until
from sandbox.topology import ALICE, BOB, SharedStore

BUFFER_POOL_MIB = 1024
_REDO_LOG_MIB = 1024
_READY_SECONDS = 60.0
_LOG_TAIL_OCTETS = 2**25
# Deleted rows that the server has not cleared away yet; below this they cost nothing that is seen.
_SETTLED_HISTORY = 5000


class Stage:
    """Two key providers over one store. Nothing runs before `start`."""

    def __init__(self, root: Path) -> None:
        """Raises SandboxError when `root` is in memory: a commit would cost nothing there."""
        if file_system_of(root) in ("tmpfs", "ramfs"):
            raise SandboxError(f"{root} is in memory, not on a disk; set TMPDIR to a folder that is on one")
        self.root = root
        self._store = SharedStore(root, tls=False, buffer_pool_mib=BUFFER_POOL_MIB, log_file_mib=_REDO_LOG_MIB)
        self._store.make_key_providers()
        self.mysql = self._store.mysql
        self.alice, self.bob = self._store.key_providers
        self._others: list[KeyProvider] = []
        self._fillers: dict[str, Filler] = {}
        self._sites: SitesStage | None = None

    def start(self) -> None:
        """Start everything; returns when keys are issued both ways."""
        self._store.start_servers()
        self._store.start_key_providers()
        self.alice.wait_key(BOB)
        self.bob.wait_key(ALICE)

    def sites(self) -> SitesStage:
        """The two sites, which run beside this from the first time on that they are asked for."""
        if self._sites is None:
            tell("  starting two sites")
            self._sites = SitesStage(self.root / "sites")
            self._sites.start()
        return self._sites

    def stop(self) -> None:
        if self._sites is not None:
            self._sites.stop()
        for filler in self._fillers.values():
            filler.close()
        for other in self._others:
            other.stop_all()
        self._store.stop()

    def second_api(self, workers: int) -> KeyProvider:
        """Another api of KP_Alice on a port of its own, with as many workers."""
        other = self._other_api("workers", workers)
        other.start("api")
        other.wait_healthy(_READY_SECONDS)
        other.wait_key(BOB)
        return other

    def tls_api(self, workers: int) -> KeyProvider:
        """Another api of KP_Alice with TLS and as many workers, whose clients need no certificate."""
        other = self._other_api("tls", workers)
        other.serve_tls(free_port())
        del other.environ["SKIP_TLS_CLIENT_CA_FILE"]
        other.make_files()
        other.start("api")
        other.wait_healthy(_READY_SECONDS)
        return other

    def restart_api(self) -> None:
        """A fresh api process for KP_Alice, warm enough to issue."""
        self.alice.stop("api")
        self.alice.start("api")
        self.alice.wait_healthy(_READY_SECONDS)
        self.alice.wait_key(BOB)

    def fill(self, source: KeyProvider, target: KeyProvider, count: int, expires_at: float | None = None) -> list[str]:
        """Puts keys of `source` for `target` into the store; their keyIds."""
        filler = self._fillers.get(source.system_id)
        if filler is None:
            filler = self._fillers[source.system_id] = Filler(self.mysql.dsn, source, target)
        return filler.fill(count, expires_at)

    def settle(self) -> None:
        """Wait until peers have been sent everything and the server has cleared up after itself.

        Raises SandboxError when that does not come to an end.
        """
        with self.mysql.admin_connection() as connection:
            wait_until(lambda: _is_settled(connection, self.mysql.database), "the store to be quiet")

    def clear(self) -> None:
        """Take all keys out of the store."""
        self.settle()
        with self.mysql.admin_connection() as connection, connection.cursor() as cursor:
            cursor.execute(f"TRUNCATE TABLE `{self.mysql.database}`.key_records")

    def reasons(self) -> str:
        """What KP_Alice's api said most often of late of requests that it refused: why a run did not count."""
        log = self.alice.log_of("api")
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_TAIL_OCTETS))
            lines = [line for line in file if b'"reason"' in line and line.endswith(b"}\n")]
        said = Counter((entry["status"], entry["reason"]) for entry in map(json.loads, lines[1:]) if "status" in entry)
        return "".join(f"\n  {count} x {status} {reason}" for (status, reason), count in said.most_common(8))

    def _other_api(self, what: str, workers: int) -> KeyProvider:
        other = KeyProvider(
            ALICE,
            [BOB],
            self.mysql.dsn,
            self._store.rabbitmq.url,
            root=self.alice.root,
            log_dir=self._store.logs / f"{what}-{workers}",
            env_overrides={"SKIP_API_WORKERS": str(workers)},
        )
        self._others.append(other)
        return other


def _is_settled(connection: pymysql.connections.Connection[Any], database: str) -> bool:
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT 1 FROM `{database}`.outbox LIMIT 1")
        if cursor.fetchone():
            return False
        cursor.execute("SELECT count FROM information_schema.innodb_metrics WHERE name = 'trx_rseg_history_len'")
        row = cursor.fetchone()
    return row is None or row[0] < _SETTLED_HISTORY
