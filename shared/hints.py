"""What a process says of an outbox row that it is about to commit, so that the next one can begin meanwhile.

A hint stands in a nudge, and like a nudge it carries no truth: whoever gets one may get ready by it, and then does only
what the store says. So a hint may be lost, late, forged, or of a row that is never committed.

Who tells ahead of a commit tells again where the commit takes longer than ``AHEAD_SECONDS``; who was told and finds
nothing looks again after as long. So a row that was told of is seen, whichever of the two is faster.
"""

from __future__ import annotations

from typing import NamedTuple

from skipbus.shared.protocol import encoding

AHEAD_SECONDS = 0.002
TOKEN_BYTES = 16
MAX_HINT_BYTES = 1_024


class Hint(NamedTuple):
    """A ``key.placed`` row with one key: for whom, its token, and its payload."""

    peer_id: str
    token: bytes
    payload: bytes


def pack_hint(hint: Hint) -> bytes | None:
    """The item of a nudge; None where it does not fit into one."""
    item = encoding.pack(list(hint))
    return item if len(item) <= MAX_HINT_BYTES else None


def read_hint(item: bytes) -> Hint | None:
    """The hint in an item; None where it is none. Anybody with an account at the broker may have sent it."""
    try:
        peer_id, token, payload = encoding.unpack(item, max_items=3)
    except (ValueError, TypeError):
        return None
    if not (isinstance(peer_id, str) and isinstance(token, bytes) and isinstance(payload, bytes)):
        return None
    return Hint(peer_id, token, payload) if len(token) == TOKEN_BYTES and payload else None
