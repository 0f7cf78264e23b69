"""What stages and items share: the URL of a key, waiting until keys are issued, and progress on stderr."""

from __future__ import annotations

import sys

from sandbox.client import get
from sandbox.key_provider import KeyProvider
from sandbox.processes import wait_until


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
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
