"""What several tests begin with: a migrated store, a cable."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.cable import Cable
from sandbox.mariadb import Database, MariaDbServer
from tests.integration.key_providers import Store


@pytest.fixture
def cable() -> Iterator[Cable]:
    """A whole one."""
    with Cable() as made:
        yield made


@pytest.fixture(scope="session")
def store_database(mariadb: MariaDbServer) -> Iterator[Database]:
    """Migrated once, by the first test that uses it."""
    with mariadb.databases("store") as (made,):
        yield made


@pytest.fixture
def store(store_database: Database, tmp_path: Path) -> Iterator[Store]:
    """A migrated store without a row. No other test uses it at the same time."""
    made = Store(store_database, tmp_path)
    yield made
    made.empty()
    made.close()
