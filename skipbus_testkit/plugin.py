"""pytest fixtures: ``skip_pair``, one for the whole run, and ``fresh_skip_pair``, one for a test alone.

``skip_pair`` is healed before each test that uses it. What a pair is made with is the fixture ``skip_pair_options``,
which a conftest.py may override, session-wide: ``return {"database": "mariadb:11.8", "key_ttl_seconds": 60}``.
pytest finds it once skipbus-testkit is installed. Nothing is imported or started before a test asks for a pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from skipbus_testkit.pair import SkipPair


@pytest.fixture(scope="session")
def skip_pair_options() -> dict[str, Any]:
    """The arguments of every ``SkipPair``."""
    return {}


@pytest.fixture(scope="session")
def _session_skip_pair(skip_pair_options: dict[str, Any]) -> Iterator[SkipPair]:
    from skipbus_testkit.pair import SkipPair  # noqa: PLC0415 -- takes 0.3 s: only tests that need a pair pay for it

    with SkipPair(**skip_pair_options) as pair:
        yield pair


@pytest.fixture
def skip_pair(_session_skip_pair: SkipPair) -> SkipPair:
    """The run's pair, without the faults and the recorded requests of earlier tests."""
    _session_skip_pair.heal()
    return _session_skip_pair


@pytest.fixture
def fresh_skip_pair(skip_pair_options: dict[str, Any]) -> Iterator[SkipPair]:
    """A pair of this test's own."""
    from skipbus_testkit.pair import SkipPair  # noqa: PLC0415

    with SkipPair(**skip_pair_options) as pair:
        yield pair
