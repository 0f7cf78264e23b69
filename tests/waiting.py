"""Waiting in tests: for a fact to become true, never for a time to pass."""

from __future__ import annotations

from collections.abc import Callable

from sandbox.processes import POLL_SECONDS, wait_until


def wait_for(condition: Callable[[], bool], *, timeout_seconds: float, poll_seconds: float = POLL_SECONDS) -> None:
    """Return once the condition holds. Raises SandboxError after the timeout."""
    wait_until(condition, "what the test waits for", timeout_seconds, poll_seconds)
