"""The servers that integration and system tests share: private ones, started on first use and stopped at the end.

SKIPBUS_TEST_MYSQL and SKIPBUS_TEST_RABBITMQ, read here and nowhere else, name servers to test on instead
(``tests.given_servers``). A server that cannot be started or reached fails the tests that need it; nothing is skipped.

Tests run in several processes at once (pytest-xdist), a file of tests in one of them. Each has servers of its own.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from sandbox.mariadb import Database, MariaDbServer
from sandbox.ports import PORT_SHARE
from sandbox.rabbitmq import RabbitMqServer
from tests.given_servers import GivenMySql, GivenRabbitMq
from tests.longest_first import longest_first

# How long one example takes says nothing on a machine that does other things; speed is measured in bench/.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_configure() -> None:
    """Each process that runs tests takes ports of its own share, and so do the programs that its tests start."""
    worker, count = os.environ.get("PYTEST_XDIST_WORKER"), os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    if worker is not None and count is not None:
        os.environ[PORT_SHARE] = f"{worker.removeprefix('gw')}/{count}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest_first(items)


@pytest.fixture(scope="session")
def mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDbServer]:
    """A private MariaDB (or MySQL), or the given one. A test that stops or kills it starts it again."""
    root = tmp_path_factory.mktemp("mariadb")
    if url := os.environ.get("SKIPBUS_TEST_MYSQL"):
        yield GivenMySql(url, root)
        return
    with MariaDbServer(root) as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMqServer]:
    """A private RabbitMQ, or the given one. A test that stops or kills it starts it again."""
    root = tmp_path_factory.mktemp("rabbitmq")
    if url := os.environ.get("SKIPBUS_TEST_RABBITMQ"):
        yield GivenRabbitMq(url, root)
        return
    with RabbitMqServer(root) as server:
        yield server


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every account of this host may enter, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory(prefix="skipbus-open-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.fixture
def database(mariadb: MariaDbServer) -> Iterator[Database]:
    """An empty database of this test's own, with a user who has all rights on it and on nothing else."""
    with mariadb.databases("test") as (made,):
        yield made
