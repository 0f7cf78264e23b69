"""Labs for the system tests. A module shares one running pair where its tests do not break it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sandbox.key_provider import KeyProvider
from sandbox.mariadb import MariaDbServer
from sandbox.rabbitmq import RabbitMqServer
from tests.system.harness import Lab, Place


@contextmanager
def new_lab(root: Path, mariadb: MariaDbServer, rabbitmq: RabbitMqServer) -> Iterator[Lab]:
    """A lab over an empty database of its own."""
    with mariadb.databases("system") as (database,), Lab(root, Place(database, rabbitmq.url)) as lab:
        yield lab


@pytest.fixture(scope="module")
def only_demo() -> Iterator[None]:
    """No other module's demo runs now, in any process of these tests: the folder of a demo is its clone's."""
    # Not on the file that a demo locks itself.
    with Path(__file__).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="module")
def shared_lab(
    tmp_path_factory: pytest.TempPathFactory, mariadb: MariaDbServer, rabbitmq: RabbitMqServer
) -> Iterator[Lab]:
    """A lab for a module whose tests leave its processes alone."""
    with new_lab(tmp_path_factory.mktemp("lab"), mariadb, rabbitmq) as lab:
        yield lab


@pytest.fixture
def lab(tmp_path: Path, mariadb: MariaDbServer, rabbitmq: RabbitMqServer) -> Iterator[Lab]:
    """A lab of this test's own."""
    with new_lab(tmp_path, mariadb, rabbitmq) as made:
        yield made


@pytest.fixture(scope="module")
def pair(shared_lab: Lab) -> tuple[KeyProvider, KeyProvider]:
    """KP_Alice and KP_Bob, running."""
    return shared_lab.add_pair()


@pytest.fixture(scope="module")
def alice(pair: tuple[KeyProvider, KeyProvider]) -> KeyProvider:
    return pair[0]


@pytest.fixture(scope="module")
def bob(pair: tuple[KeyProvider, KeyProvider]) -> KeyProvider:
    return pair[1]
