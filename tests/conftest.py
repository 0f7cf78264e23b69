"""The private servers that integration and system tests share, started on first use and stopped at the end.

A server that cannot be started fails the tests that need it; nothing is skipped.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from sandbox.servers import Database, MariaDbServer, RabbitMqServer


@pytest.fixture(scope="session")
def mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDbServer]:
    """A private MariaDB (or MySQL). A test that stops or kills it starts it again."""
    server = MariaDbServer(tmp_path_factory.mktemp("mariadb"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMqServer]:
    """A private RabbitMQ. A test that stops or kills it starts it again."""
    server = RabbitMqServer(tmp_path_factory.mktemp("rabbitmq"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def database(mariadb: MariaDbServer) -> Iterator[Database]:
    """An empty database of this test's own, with a user who has all rights on it and on nothing else."""
    name = f"test_{secrets.token_hex(6)}"
    made = mariadb.create_database(name, user=name)
    yield made
    mariadb.drop_database(made)
