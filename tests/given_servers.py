"""Servers that somebody else runs, in the place of the private ones: for tests on other releases.

They are never started, stopped or killed here. A test that needs that bears the mark ``stops_servers``; run without
it (``-m "not stops_servers"``) there. What a test makes in MySQL it drops again; a broker keeps the queues of the key
providers that were tested, whose names do not come again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

import pymysql

from sandbox.mariadb import MariaDbServer
from sandbox.ports import LOOPBACK
from sandbox.processes import SandboxError
from sandbox.rabbitmq import RabbitMqServer
from sandbox.server import Server


class _Given(Server):
    """A server by its URL, with an account that may do everything."""

    variable: str

    def __init__(self, url: str, root: Path, default_port: int) -> None:
        Server.__init__(self, root, None)
        parts = urlsplit(url)
        self.host = parts.hostname or LOOPBACK
        self.port = parts.port or default_port
        self.user = unquote(parts.username or "")
        self.password = unquote(parts.password or "")

    def start(self) -> None:
        """It runs already."""

    def stop(self) -> NoReturn:
        raise SandboxError(f"{self.variable} names a server that is not this test's to stop: -m 'not stops_servers'")

    terminate = kill = restart = stop


class GivenMySql(_Given, MariaDbServer):
    """``mysql://user:password@host:port``"""

    variable = "SKIPBUS_TEST_MYSQL"

    def __init__(self, url: str, root: Path) -> None:
        _Given.__init__(self, url, root, 3306)
        self.database = "skipbus"

    def admin_connection(self) -> pymysql.connections.Connection[Any]:
        return pymysql.connect(host=self.host, port=self.port, user=self.user, password=self.password, autocommit=True)


class GivenRabbitMq(_Given, RabbitMqServer):
    """``amqp://user:password@host:port/``"""

    variable = "SKIPBUS_TEST_RABBITMQ"

    def __init__(self, url: str, root: Path) -> None:
        _Given.__init__(self, url, root, 5672)
        self._given_url = url

    @property
    def url(self) -> str:
        return self._given_url
