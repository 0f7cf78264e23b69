"""What an outbox row's type means to the syncer: the envelope that it becomes, and what it counts as. Pure.

Most rows have the name of their envelope type. Those of a bus link that have another name differ in what happens
when they are acknowledged, withdrawn or refused, not in what the peer is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.store.outbox import KEY_PLACED, KEY_STOCKED

# Stock that is taken back was never issued to anybody, so it does not count as withdrawn.
STOCK_DROPPED = "stock.dropped"
SEALED_TYPES = frozenset({KEY_PLACED, KEY_STOCKED})
_ENVELOPE_TYPES = {
    KEY_PLACED: EnvelopeType.KEY_ISSUED,
    KEY_STOCKED: EnvelopeType.KEY_ISSUED,
    STOCK_DROPPED: EnvelopeType.KEY_WITHDRAWN,
}
# What the local KP issued for the peer or took back, gave out of the peer's keys, or saw expire of them. Keys on
# demand count as issued when the peer has acknowledged them: until then they may be taken back.
_COUNTERS = {
    EnvelopeType.KEY_ISSUED.value: "issued",
    EnvelopeType.KEY_WITHDRAWN.value: "withdrawn",
    EnvelopeType.KEY_RETRIEVED.value: "inbound_retrieved",
    EnvelopeType.KEY_EXPIRED.value: "inbound_expired",
}


def envelope_type(row_type: str) -> EnvelopeType:
    """The envelope that such rows become. ValueError for a type that no release of ours writes."""
    return _ENVELOPE_TYPES.get(row_type) or EnvelopeType(row_type)


def counter_when_numbered(row_type: str) -> str | None:
    """The counter of the peer's row that such rows are added to when they are put into an envelope."""
    return _COUNTERS.get(row_type)


# Where an entry of such rows has the expiry (UTC ms) of its key. Once it has passed there is nothing left to store, to
# delete or to take back at the peer. What a peer's keys came to, retrieved or expired, is still news after that; keys
# on demand are not here because whoever waits for one takes a row that is gone for placed.
_EXPIRY_AT = {
    EnvelopeType.KEY_ISSUED.value: 2,
    EnvelopeType.KEY_WITHDRAWN.value: 1,
    KEY_STOCKED: 2,
    STOCK_DROPPED: 1,
}


def keys_expire_ms(row_type: str, entries: Sequence[Sequence[Any]]) -> int | None:
    """When (UTC ms) the last of the keys expires that such rows speak of; None where that makes no difference."""
    place = _EXPIRY_AT.get(row_type)
    return None if place is None or not entries else max(entry[place] for entry in entries)


def urgency(row_type: str) -> int:
    """Smaller is sent first: somebody waits for an answer to keys on demand."""
    return 0 if row_type == KEY_PLACED else 1
