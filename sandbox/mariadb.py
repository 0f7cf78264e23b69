"""A private MariaDB (or MySQL) server.

Durability is as production must have it (`innodb_flush_log_at_trx_commit=1`).
"""

from __future__ import annotations

import getpass
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pymysql

from sandbox.ports import LOOPBACK, answers, free_port
from sandbox.processes import Child, SandboxError, find_program, minimal_environ, tail, write_private
from sandbox.server import Server
from skipbus.shared.settings import MySqlSettings, Secret


@dataclass(frozen=True)
class Database:
    """How to reach one database. The password stays out of the repr."""

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    database: str

    @property
    def settings(self) -> MySqlSettings:
        """The same as a process of a key provider has it."""
        return MySqlSettings(self.host, self.port, self.user, Secret(self.password), self.database)

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

    @contextmanager
    def databases(self, *names: str) -> Iterator[list[Database]]:
        """Empty databases, one for each name, each with a user of its own; they are dropped at the end of the block."""
        suffix = secrets.token_hex(6)
        made = [self.create_database(f"{name}_{suffix}", user=f"{name}_{suffix}") for name in names]
        try:
            yield made
        finally:
            for database in made:
                self.drop_database(database)

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

    def share_accounts(self, other: MariaDbServer) -> None:
        """Use the passwords of another node of the same cluster; before the start."""
        self.password, self._admin_password = other.password, other._admin_password

    def _user(self) -> str:
        """Whom the server runs as. It runs as root only where that is requested explicitly."""
        return getpass.getuser()

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
            f"--user={self._user()}",
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
                f"--user={self._user()}",
                "--initialize-insecure",
                f"--datadir={self.datadir}",
            ]
        return [
            find_program("mariadb-install-db", "mysql_install_db"),
            "--no-defaults",
            f"--user={self._user()}",
            f"--datadir={self.datadir}",
            # No account without a password, not even for the moment until the init file has run.
            "--auth-root-authentication-method=socket",
            f"--auth-root-socket-user={self._user()}",
            "--skip-test-db",
        ]


def _flavour(program: str) -> Literal["mariadb", "mysql"]:
    version = subprocess.run([program, "--no-defaults", "--version"], capture_output=True, text=True, check=True)
    return "mariadb" if "mariadb" in version.stdout.lower() else "mysql"
