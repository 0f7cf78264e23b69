"""A private MariaDB Galera cluster of three nodes, all on loopback.

A node that starts as root changes to the user `mysql`: as root it could not be sent the data (rsync refuses to read
them). That user may not enter our folders, so the cluster has a folder of its own in /var/tmp.
"""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from pathlib import Path

import pymysql

from sandbox.mariadb import Database, MariaDbServer
from sandbox.ports import LOOPBACK, free_port
from sandbox.processes import SandboxError, Startable
from sandbox.server import START_SECONDS

NODES = 3
PREFIX = "skipbus-galera-"
_PROVIDERS = ("/usr/lib/galera/libgalera_smm.so", "/usr/lib64/galera-4/libgalera_smm.so")
_USER = "mysql"
_ENTERED_BY_ALL = "/var/tmp"  # noqa: S108 -- mkdtemp makes a folder of our own in it
# A node that joins is sent all data first.
_JOIN_SECONDS = 2 * START_SECONDS


class GaleraNode(MariaDbServer):
    """One node. `start` joins the others; `found` begins a cluster, or goes on with one that was shut down."""

    name = "Galera node"

    def __init__(self, root: Path, number: int, *, log: Path | None = None, buffer_pool_mib: int = 64) -> None:
        super().__init__(root, log=log, buffer_pool_mib=buffer_pool_mib, log_file_mib=64)
        self.number = number
        self.group_port, self._ist_port, self._sst_port = free_port(), free_port(), free_port()
        self.members: list[GaleraNode] = [self]
        self._founds = False

    def found(self) -> None:
        """Start as the first node. Returns once it serves."""
        self._founds = True
        try:
            self.start()
        finally:
            self._founds = False

    def wait_ready(self, timeout_seconds: float = _JOIN_SECONDS) -> None:
        super().wait_ready(timeout_seconds)

    def status(self, name: str) -> str:
        """One of the node's `wsrep_` status variables. Raises pymysql.MySQLError."""
        with self.admin_connection() as connection, connection.cursor() as cursor:
            cursor.execute("SHOW GLOBAL STATUS LIKE %s", (name,))
            row = cursor.fetchone()
            return str(row[1]) if row else ""

    def _serves(self) -> bool:
        try:
            return super()._serves() and self.status("wsrep_local_state_comment") == "Synced"
        except pymysql.MySQLError:
            return False

    def _command(self) -> list[str]:
        others = "" if self._founds else ",".join(f"{LOOPBACK}:{member.group_port}" for member in self.members)
        options = {
            "base_port": self.group_port,
            "gmcast.listen_addr": f"tcp://{LOOPBACK}:{self.group_port}",
            "ist.recv_addr": f"{LOOPBACK}:{self._ist_port}",
            "gcache.size": "64M",
            # How soon a node that has ended without a word is left out. The default is 5 s.
            "evs.keepalive_period": "PT0.5S",
            "evs.suspect_timeout": "PT2S",
            "evs.inactive_timeout": "PT6S",
            "pc.recovery": "false",
        }
        # Here and not by the server itself: changing the user would lose the kernel's promise to end it with us.
        as_user = ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--init-groups", "--pdeathsig=KILL", "--"]
        return [
            *(as_user if os.geteuid() == 0 else []),
            *super()._command(),
            "--binlog-format=ROW",
            "--innodb-autoinc-lock-mode=2",
            "--wsrep-on=ON",
            f"--wsrep-provider={_provider()}",
            f"--wsrep-provider-options={';'.join(f'{name}={value}' for name, value in options.items())}",
            "--wsrep-cluster-name=skipbus",
            f"--wsrep-cluster-address=gcomm://{others}",
            f"--wsrep-node-name=node-{self.number}",
            f"--wsrep-node-address={LOOPBACK}",
            "--wsrep-sst-method=rsync",
            f"--wsrep-sst-receive-address={LOOPBACK}:{self._sst_port}",
            "--wsrep-slave-threads=2",
        ]

    def _user(self) -> str:
        return _USER if os.geteuid() == 0 else super()._user()

    def launch(self) -> None:
        _give_to_user(self.root)
        super().launch()

    def _init_sql(self) -> str:
        # What one node says is said to all; the accounts come with the data to a node that joins.
        return super()._init_sql() if self._founds else ""

    def _environ(self) -> dict[str, str]:
        # The scripts that send and receive data call programs by name.
        environ = super()._environ()
        _give_to_user(self.root)
        return environ


class GaleraCluster(Startable):
    """Three nodes; each has a port of its own, and the same accounts and databases."""

    def __init__(self, *, logs: Path | None = None, buffer_pool_mib: int = 64) -> None:
        # TMPDIR may be a folder that only its owner enters.
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_ENTERED_BY_ALL))
        self.folder.chmod(0o755)
        self.nodes = [
            GaleraNode(
                self.folder / f"node-{number}",
                number,
                log=logs / f"galera-{number}.log" if logs else None,
                buffer_pool_mib=buffer_pool_mib,
            )
            for number in range(1, NODES + 1)
        ]
        first = self.nodes[0]
        for node in self.nodes:
            node.members = self.nodes
            node.share_accounts(first)

    def start(self) -> None:
        first, *others = self.nodes
        first.found()
        for node in others:
            # One after the other: two that ask the same donor at once would wait for each other.
            node.start()

    def stop(self) -> None:
        for node in reversed(self.nodes):
            node.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def database(self, database: Database, node: GaleraNode) -> Database:
        """The same database by way of one node."""
        return Database(node.host, node.port, database.user, database.password, database.database)


def _provider() -> str:
    for path in _PROVIDERS:
        if Path(path).exists():
            return path
    raise SandboxError("Galera is not installed: apt-get install galera-4 rsync")


def _give_to_user(root: Path) -> None:
    if os.geteuid() == 0:
        user = pwd.getpwnam(_USER)
        for path in (root, *root.rglob("*")):
            os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)
