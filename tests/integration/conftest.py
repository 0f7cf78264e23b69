"""What most tests of the store begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.servers import Database
from tests.integration.key_providers import Store


@pytest.fixture
def store(database: Database, tmp_path: Path) -> Iterator[Store]:
    """A migrated store of the test's own."""
    made = Store(database, tmp_path)
    yield made
    made.close()
