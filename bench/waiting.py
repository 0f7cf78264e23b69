"""What stages and items share: URLs, a word on what goes on, and waiting for something to come to pass."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from sandbox.client import get
from sandbox.key_provider import KeyProvider
from sandbox.processes import SandboxError

_WAIT_SECONDS = 120.0


def key_url(key_provider: KeyProvider, remote: KeyProvider) -> str:
    """`GET /key` at one KP for the other."""
    return f"{key_provider.url}/key?remoteSystemID={remote.system_id}"


def wait_for_keys(key_provider: KeyProvider, remote_id: str) -> None:
    """Wait until the KP can seal to its remote, which it hears of a moment after it is healthy itself."""
    wait_until(
        lambda: get(key_provider.url, "key", remoteSystemID=remote_id).status == 200,
        f"{key_provider.system_id} to issue keys",
    )


def tell(text: str) -> None:
    """A word on stderr about what goes on."""
    print(text, file=sys.stderr, flush=True)


def wait_until(condition: Callable[[], bool], what: str, timeout_seconds: float = _WAIT_SECONDS) -> None:
    """Raises SandboxError when it does not come to pass in good time."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SandboxError(f"waited {timeout_seconds:.0f} s in vain for {what}")
        time.sleep(0.1)
