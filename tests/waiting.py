"""Waiting in tests: for a fact to become true, never for a time to pass."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_for(condition: Callable[[], bool], *, timeout_seconds: float, poll_seconds: float = 0.05) -> None:
    """Return once the condition holds. Raises AssertionError after the timeout."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"still not true after {timeout_seconds} s")
        time.sleep(poll_seconds)
