"""`make demo TOPOLOGY=cluster` as a user meets it: what it tells, and that nothing is left."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.system.test_demo import DEMO_DIR, finish, start_demo

pytestmark = pytest.mark.usefixtures("only_demo")


def folders_of_clusters() -> set[Path]:
    return set(Path("/var/tmp").glob("skipbus-galera-*"))  # noqa: S108


def test_once_tells_of_the_lost_nodes_and_of_their_return_and_leaves_nothing(tmp_path: Path) -> None:
    before = folders_of_clusters()
    demo = start_demo(tmp_path, TOPOLOGY="cluster", ONCE="1")
    output = finish(demo, timeout_seconds=240)
    assert demo.returncode == 0, output
    story = (
        r"node of the database.*killed.*all hosts serve.*node of the broker.*killed.*all hosts serve.*back.*all hosts"
    )
    assert re.search(story, output, re.DOTALL), output
    assert re.search(r"\b[0-9a-f]{33,}", output) is None
    assert list(tmp_path.iterdir()) == []
    assert folders_of_clusters() == before
    assert not DEMO_DIR.exists()
