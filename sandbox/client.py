"""One request to a key provider's plain port, and the key that it answers with."""

from __future__ import annotations

from dataclasses import dataclass, field

from skipbus_testkit.client import Answer, Client


@dataclass(frozen=True)
class Key:
    """One key as `GET /key` answered it."""

    source: str
    target: str
    key_id: str
    key: str = field(repr=False)


def get(url: str, *path: str, timeout_seconds: float = 10, **query: str) -> Answer:
    """`GET url/path…?query`. Raises OSError when nobody answers."""
    return Client(url, timeout_seconds=timeout_seconds).get(*path, **query)
