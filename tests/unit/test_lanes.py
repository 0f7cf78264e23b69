"""Facts about when the lanes of an api keep their process awake: only where a processor is left for the store."""

from __future__ import annotations

import subprocess

import pytest

from skipbus.services.api import lanes, workers


@pytest.mark.parametrize(
    ("processors", "together", "awake"), [(1, 1, False), (2, 1, True), (2, 2, False), (4, 3, True), (4, 8, False)]
)
def test_a_lane_stays_awake_only_where_a_processor_is_left_for_the_store(
    monkeypatch: pytest.MonkeyPatch, processors: int, together: int, *, awake: bool
) -> None:
    started: list[dict[str, str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda _command, *, env, **_: started.append(env))
    workers._Worker(0, together, 0)
    monkeypatch.setattr("skipbus.services.api.workers.os.environ", started[0])
    monkeypatch.setattr(lanes, "_processors", lambda: processors)
    assert lanes.spares_a_processor() is awake
