"""How an api reaches a key provider: over one store that both use, or over a bus.

``Link`` is the one interface. ``store`` is the link over one store, ``bus`` the link over a bus, ``stock_claim`` and
``refill`` the keys that a bus link has ready. ``sealing`` holds the wrapping keys in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol


class IssueRequest(NamedTuple):
    """A fresh key of ``size_bits`` for the KP ``target_id``."""

    target_id: str
    size_bits: int
    correlation_id: str


@dataclass(frozen=True, slots=True, repr=False)
class IssuedKey:
    """A key that its target can serve: both parts in lower-case hex. Without a repr, so that no log can hold it."""

    key_id: str
    key: str


@dataclass(frozen=True, slots=True, repr=False)
class ClaimedKey:
    """A key in lower-case hex, gone from the store, and the correlation id of the request that issued it."""

    key: str
    issue_correlation_id: str


class Link(Protocol):
    """The way to other key providers. Both methods raise SkipbusError; see ``shared.errors`` for whose fault it is."""

    async def issue(self, target_id: str, size_bits: int, correlation_id: str) -> IssuedKey:
        """A fresh key that the target can serve from now on (draft 4.2)."""

    async def claim(self, source_id: str, key_id: bytes, correlation_id: str) -> ClaimedKey:
        """The key that the source issued under this keyId, once (draft 4.2.1)."""
