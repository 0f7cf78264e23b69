"""Private MariaDB (or MySQL) and RabbitMQ servers: own data folder, own ports, loopback only, own processes.

Durability is as production must have it (`innodb_flush_log_at_trx_commit=1`). Nothing of the machine's
own servers is read or touched, and a stopped server leaves no process behind. How long a start may take, and
what is said when it fails, is here; who restarts a server that died is the supervisor's affair.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import pymysql

from sandbox.federation import PLUGINS, Account, Upstream, definitions, upstream_uri
from sandbox.ports import LOOPBACK, answers, free_port
from sandbox.processes import (
    Child,
    SandboxError,
    find_program,
    minimal_environ,
    tail,
    write_private,
)

_COMPOSE = Path(__file__).resolve().parent.parent / "compose"
START_SECONDS = 60.0
STOP_SECONDS = 30.0
_EPMD_SECONDS = 10.0


@dataclass(frozen=True)
class Database:
    """How to reach one database. The password stays out of the repr."""

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    database: str

    def connect(self, *, autocommit: bool = True) -> pymysql.connections.Connection[Any]:
        """A new connection. Raises pymysql.MySQLError."""
        return pymysql.connect(
            host=self.host,
            port=self.port,
            user=self.user,
            password=self.password,
            database=self.database,
            autocommit=autocommit,
        )


class Server:
    """What both servers share: a child process that is started, waited for and ended."""

    name: str
    port: int

    def __init__(self, root: Path, log: Path | None) -> None:
        self.root = root
        self.log = log or root / "server.log"
        self.pid_file = root / "server.pid"
        self._child: Child | None = None
        root.mkdir(parents=True, exist_ok=True, mode=0o700)

    @property
    def pid(self) -> int:
        """The server's process id. Raises SandboxError when it was never started or was stopped."""
        if self._child is None:
            raise SandboxError(f"{self.name} is not started")
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.running

    @property
    def adopted_pid(self) -> int | None:
        """Who serves in our place, by the pid file: someone may have started the server by hand."""
        try:
            return int(self.pid_file.read_text())
        except (OSError, ValueError):
            return None

    def start(self) -> None:
        """Start and wait until it serves. Does nothing when it runs. Raises SandboxError."""
        if not self.running:
            self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start without waiting."""
        raise NotImplementedError

    def stop(self) -> None:
        """End it in order, leaving the data folder for the next start."""
        if self._child is not None:
            self._child.stop(STOP_SECONDS)
            self._child = None

    def terminate(self) -> None:
        """Ask it to end, without waiting."""
        if self._child is not None:
            self._child.terminate()

    def kill(self) -> None:
        """SIGKILL, as a crash would; `start()` starts it again on the same data and ports."""
        if self._child is not None:
            self._child.kill()

    def restart(self) -> None:
        self.stop()
        self.start()

    def wait_ready(self, timeout_seconds: float = START_SECONDS) -> None:
        """Wait until a client is served. Raises SandboxError with the log's end."""
        if self._child is None:
            raise SandboxError(f"{self.name} is not started")
        self._child.wait_ready(self._serves, self.name, timeout_seconds)

    def _serves(self) -> bool:
        raise NotImplementedError


class MariaDbServer(Server):
    """A private MariaDB, or MySQL where that is what is installed."""

    name = "MariaDB"
    flavour: Literal["mariadb", "mysql"]

    def __init__(
        self,
        root: Path,
        *,
        port: int | None = None,
        log: Path | None = None,
        buffer_pool_mib: int = 512,
        log_file_mib: int = 256,
    ) -> None:
        super().__init__(root, log)
        self.host = LOOPBACK
        self.port = port or free_port()
        self.user = "skipbus"
        self.password = secrets.token_hex(16)
        self.database = "skipbus"
        self.datadir = root / "data"
        self.program = find_program("mariadbd", "mysqld")
        self.flavour = _flavour(self.program)
        self._buffer_pool_mib = buffer_pool_mib
        self._log_file_mib = log_file_mib
        self._admin_password = secrets.token_hex(16)
        self._init_file = root / "init.sql"

    @property
    def dsn(self) -> Database:
        """The database `skipbus`, with all rights on it."""
        return Database(self.host, self.port, self.user, self.password, self.database)

    def launch(self) -> None:
        if not (self.datadir / "mysql").is_dir():
            self._make_data_folder()
        write_private(self._init_file, self._init_sql())
        self._child = Child(self._command(), environ=self._environ(), log=self.log, cwd=self.root)

    def create_database(self, name: str, user: str | None = None) -> Database:
        """Make an empty database, and a user with all rights on it (the user `skipbus` unless named)."""
        account, password = user or self.user, secrets.token_hex(16) if user else self.password
        self._administer(
            f"CREATE DATABASE `{name}` CHARACTER SET utf8mb4",
            f"CREATE USER IF NOT EXISTS '{account}'@'%' IDENTIFIED BY '{password}'",
            f"GRANT ALL PRIVILEGES ON `{name}`.* TO '{account}'@'%'",
        )
        return Database(self.host, self.port, account, password, name)

    def drop_database(self, database: Database) -> None:
        """Drop a database that `create_database` made, and its user unless that is `skipbus`."""
        statements = [f"DROP DATABASE IF EXISTS `{database.database}`"]
        if database.user != self.user:
            statements.append(f"DROP USER IF EXISTS '{database.user}'@'%'")
        self._administer(*statements)

    def admin_connection(self) -> pymysql.connections.Connection[Any]:
        """A connection with every right, for tests that change grants, kill connections or set globals."""
        return pymysql.connect(
            host=self.host,
            port=self.port,
            user="sandbox_admin",
            password=self._admin_password,
            autocommit=True,
        )

    def _administer(self, *statements: str) -> None:
        with self.admin_connection() as connection, connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)

    def _serves(self) -> bool:
        if not answers(self.port):
            return False
        try:
            self.admin_connection().close()
        except pymysql.MySQLError:
            return False
        return True

    def _command(self) -> list[str]:
        by_flavour = {
            # MySQL's own default up to 16 processors: on a small machine, four threads that clear away what a janitor
            # deletes keep the callers waiting.
            "mariadb": [f"--innodb-log-file-size={self._log_file_mib}M", "--innodb-purge-threads=1"],
            "mysql": [f"--innodb-redo-log-capacity={self._log_file_mib}M", "--mysqlx=OFF"],
        }
        return [
            self.program,
            "--no-defaults",
            *_as_root_user(),
            f"--datadir={self.datadir}",
            # Relative to the data folder: the path of a Unix socket may have only 107 bytes.
            "--socket=server.sock",
            f"--pid-file={self.pid_file}",
            f"--port={self.port}",
            f"--bind-address={self.host}",
            "--skip-name-resolve",
            "--skip-log-bin",
            "--max-connections=400",
            "--character-set-server=utf8mb4",
            "--innodb-flush-log-at-trx-commit=1",
            f"--innodb-buffer-pool-size={self._buffer_pool_mib}M",
            f"--init-file={self._init_file}",
            *by_flavour[self.flavour],
        ]

    def _init_sql(self) -> str:
        """Accounts are settled before the first connection is let in, at every start alike."""
        return "\n".join(
            [
                f"ALTER USER 'root'@'localhost' IDENTIFIED BY '{self._admin_password}';",
                f"CREATE USER IF NOT EXISTS 'sandbox_admin'@'%' IDENTIFIED BY '{self._admin_password}';",
                "GRANT ALL PRIVILEGES ON *.* TO 'sandbox_admin'@'%' WITH GRANT OPTION;",
                f"CREATE DATABASE IF NOT EXISTS `{self.database}` CHARACTER SET utf8mb4;",
                f"CREATE USER IF NOT EXISTS '{self.user}'@'%' IDENTIFIED BY '{self.password}';",
                f"GRANT ALL PRIVILEGES ON `{self.database}`.* TO '{self.user}'@'%';",
                "",
            ]
        )

    def _environ(self) -> dict[str, str]:
        # In a shared folder a server that starts would remove the temporary tables of all others.
        temporary = self.root / "tmp"
        temporary.mkdir(exist_ok=True, mode=0o700)
        return {**minimal_environ(self.root), "TMPDIR": str(temporary)}

    def _make_data_folder(self) -> None:
        shutil.rmtree(self.datadir, ignore_errors=True)
        command, log = self._install_command(), self.root / "install.log"
        code = Child(command, environ=self._environ(), log=log, cwd=self.root).wait()
        if code != 0:
            raise SandboxError(f"{Path(command[0]).name} ended with {code}\n{tail(log)}")

    def _install_command(self) -> list[str]:
        if self.flavour == "mysql":
            return [
                self.program,
                "--no-defaults",
                *_as_root_user(),
                "--initialize-insecure",
                f"--datadir={self.datadir}",
            ]
        return [
            find_program("mariadb-install-db", "mysql_install_db"),
            "--no-defaults",
            f"--user={getpass.getuser()}",
            f"--datadir={self.datadir}",
            # No account without a password, not even for the moment until the init file has run.
            "--auth-root-authentication-method=socket",
            f"--auth-root-socket-user={getpass.getuser()}",
            "--skip-test-db",
        ]


class RabbitMqServer(Server):
    """A private RabbitMQ node with an epmd of its own."""

    name = "RabbitMQ"

    def __init__(
        self,
        root: Path,
        *,
        port: int | None = None,
        log: Path | None = None,
        dist_port: int | None = None,
        epmd_port: int | None = None,
    ) -> None:
        super().__init__(root, log)
        self.host = LOOPBACK
        self.port = port or free_port()
        self.dist_port = dist_port or free_port()
        self.epmd_port = epmd_port or free_port()
        self.user = "skipbus"
        self.password = secrets.token_hex(16)
        self.federation_password = secrets.token_hex(16)
        self._upstreams: Mapping[str, Sequence[Upstream]] = {}
        self.node_name = f"skipbus-{secrets.token_hex(4)}@localhost"
        # The wrapper of that name in /usr/sbin changes to another user, who may not read our folder.
        self.program = _rabbitmq_program()
        self._epmd_program = find_program("epmd")
        self._epmd: Child | None = None

    @property
    def url(self) -> str:
        return f"amqp://{self.user}:{self.password}@{self.host}:{self.port}/"

    def url_of(self, vhost: str) -> str:
        """The URL of one virtual host; that of `/` is `url`."""
        return self.url if vhost == "/" else self.url + quote(vhost, safe="")

    def upstream(self, name: str, port: int | None = None, vhost: str = "/") -> Upstream:
        """This broker as others fetch from it, by way of another port (a cable's) if that is given."""
        return Upstream(name, upstream_uri(self.federation_password, self.host, port or self.port, vhost))

    def federate(self, upstreams: Mapping[str, Sequence[Upstream]]) -> None:
        """Virtual host -> the brokers to fetch envelopes from; to be said before the start."""
        self._upstreams = upstreams

    def launch(self) -> None:
        self._write_configuration()
        self._launch_epmd()
        self._child = Child([self.program], environ=self.environ, log=self.log, cwd=self.root)

    def stop(self) -> None:
        super().stop()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd = None

    @property
    def environ(self) -> dict[str, str]:
        """What the node, and rabbitmqctl for it, must be started with."""
        root = str(self.root)
        return {
            # The Erlang cookie is made in the home folder.
            **minimal_environ(self.root),
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": self.host,
            "RABBITMQ_NODENAME": self.node_name,
            "RABBITMQ_NODE_IP_ADDRESS": self.host,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            # One scheduler thread must not be tied to one core: other servers share them.
            "RABBITMQ_SCHEDULER_BIND_TYPE": "u",
            "RABBITMQ_MNESIA_BASE": f"{root}/mnesia",
            "RABBITMQ_LOG_BASE": f"{root}/log",
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(self.pid_file),
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{root}/enabled_plugins",
            "RABBITMQ_CONFIG_FILE": f"{root}/rabbitmq.conf",
            # The machine's own configuration is not ours to follow.
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{root}/advanced.config",
            "RABBITMQ_CONF_ENV_FILE": f"{root}/rabbitmq-env.conf",
            "RABBITMQ_GENERATED_CONFIG_DIR": f"{root}/generated",
            "RABBITMQ_SCHEMA_DIR": f"{root}/schema",
            # The start script then becomes the node itself instead of a shell around it, so that its pid is
            # the node's and the kernel's signal at our death reaches the node.
            "detached": "1",
        }

    def _write_configuration(self) -> None:
        (self.root / "enabled_plugins").write_text(f"[{PLUGINS if self._upstreams else ''}].\n")
        (self.root / "rabbitmq-env.conf").write_text("")
        write_private(
            self.root / "rabbitmq.conf",
            f"listeners.tcp.1 = {self.host}:{self.port}\n"
            f"default_user = {self.user}\n"
            f"default_pass = {self.password}\n"
            "disk_free_limit.absolute = 20MB\n"
            f"{_shipped_message_limit()}\n"
            # Quorum queues reserve their write-ahead log's full size on disk.
            "raft.wal_max_size_bytes = 33554432\n" + self._write_definitions(),
        )

    def _write_definitions(self) -> str:
        """The line of the configuration that names them, if there are any."""
        if not self._upstreams:
            return ""
        file = self.root / "definitions.json"
        write_private(file, definitions(Account(self.user, self.password), self.federation_password, self._upstreams))
        return f"load_definitions = {file}\n"

    def _launch_epmd(self) -> None:
        if self._epmd is not None and self._epmd.running:
            return
        command = [self._epmd_program, "-port", str(self.epmd_port), "-address", self.host]
        self._epmd = Child(command, environ=self.environ, log=self.root / "epmd.log", cwd=self.root)
        # The node would start a stray epmd of its own if it found none.
        self._epmd.wait_ready(lambda: answers(self.epmd_port), "epmd", _EPMD_SECONDS)

    def _serves(self) -> bool:
        """Whether the broker greets: RabbitMQ listens only when it has booted."""
        try:
            with socket.create_connection((self.host, self.port), timeout=5) as connection:
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                # A method frame (type 1) on channel 0: Connection.Start.
                return connection.recv(3) == b"\x01\x00\x00"
        except OSError:
            return False


def _flavour(program: str) -> Literal["mariadb", "mysql"]:
    version = subprocess.run([program, "--no-defaults", "--version"], capture_output=True, text=True, check=True)
    return "mariadb" if "mariadb" in version.stdout.lower() else "mysql"


def _as_root_user() -> list[str]:
    """The server runs as root only when that is requested explicitly; started by another user it stays that user."""
    return ["--user=root"] if os.geteuid() == 0 else []


def _shipped_message_limit() -> str:
    """The line that operators are given for it."""
    lines = (_COMPOSE / "rabbitmq" / "rabbitmq.conf").read_text().splitlines()
    (limit,) = [line for line in lines if line.startswith("max_message_size ")]
    return limit


def _rabbitmq_program() -> str:
    debian = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
    return str(debian) if debian.exists() else find_program("rabbitmq-server")
