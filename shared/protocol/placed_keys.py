"""Sealed keys on their way to a bus peer: in the payload of an outbox row, and with their wrapping keys in an envelope.

Pure. The target cannot open what it is sent; ``services.syncer.verify`` checks what can be checked without
opening.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from msgspec import Meta, Struct

from skipbus.shared.crypto.epochs import EPOCH_ID_BYTES
from skipbus.shared.crypto.sealing import WRAPPING_KEY_ID_BYTES, KeyRecord, SealedWrappingKey
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.encoding import Positive
from skipbus.shared.protocol.envelopes import Header
from skipbus.shared.protocol.keys import KEY_ID_BYTES, MAX_KEY_BITS, MIN_KEY_BITS

# Keys that one envelope may store, delete or release at its receiver, which does so in one transaction.
MAX_KEYS = 2_000
MAX_WRAPPING_KEYS = 64
MAX_LOGGED_CORRELATION_IDS = 20
_TAG_BYTES = 16

WrappingKeyId = Annotated[bytes, Meta(min_length=WRAPPING_KEY_ID_BYTES, max_length=WRAPPING_KEY_ID_BYTES)]
# keyId, size in bits, expiry (UTC ms), correlation id, id of the wrapping key, nonce, ciphertext and tag. The column of
# correlation ids is ASCII: a text that MySQL refuses would delay the whole queue.
Record = tuple[
    Annotated[bytes, Meta(min_length=KEY_ID_BYTES, max_length=64)],
    Annotated[int, Meta(ge=MIN_KEY_BITS, le=MAX_KEY_BITS, multiple_of=8)],
    Positive,
    Annotated[str, Meta(pattern=r"\A[ -~]{0,64}\Z")],
    WrappingKeyId,
    Annotated[bytes, Meta(min_length=12, max_length=12)],
    bytes,
]
# id, epoch id, expiry (UTC ms), sealed by HPKE, ML-DSA-87 signature.
WrappingKeyEntry = tuple[
    WrappingKeyId,
    Annotated[bytes, Meta(min_length=EPOCH_ID_BYTES, max_length=EPOCH_ID_BYTES)],
    Positive,
    Annotated[bytes, Meta(min_length=1, max_length=2_048)],
    Annotated[bytes, Meta(min_length=4_627, max_length=4_627)],
]


class PlacedKeys(Struct, frozen=True):
    """``key.issued`` over a bus link: sealed keys and the wrapping keys that they need; ``stock``: ahead of need."""

    records: Annotated[Sequence[Record], Meta(min_length=1, max_length=MAX_KEYS)]
    wrapping_keys: Annotated[Sequence[WrappingKeyEntry], Meta(min_length=1, max_length=MAX_WRAPPING_KEYS)]
    stock: bool

    def __repr__(self) -> str:
        return f"<PlacedKeys {self.count}>"

    @property
    def count(self) -> int:
        """How many keys."""
        return len(self.records)

    @property
    def correlation_ids(self) -> tuple[str, ...]:
        """The first requests that the keys came from, for the log."""
        return first_requests(self.records, 3)

    def key_records(self, header: Header) -> list[KeyRecord]:
        """The records as the target stores them: from the envelope's sender, for its target."""
        return [
            KeyRecord(key_id, header.sender, header.target, bits, expires_ms, wrapping_key_id, nonce, sealed, request)
            for key_id, bits, expires_ms, request, wrapping_key_id, nonce, sealed in self.records
        ]

    def sealed_wrapping_keys(self, header: Header) -> list[SealedWrappingKey]:
        """The wrapping keys: from the envelope's sender, for its target."""
        return [
            SealedWrappingKey(wrapping_key_id, header.sender, header.target, epoch_id, expires_ms, sealed, signature)
            for wrapping_key_id, epoch_id, expires_ms, sealed, signature in self.wrapping_keys
        ]


def pack_placed_keys(
    records: Sequence[Sequence[Any]], wrapping_keys: Iterable[SealedWrappingKey], *, stock: bool
) -> bytes:
    """The payload of an envelope. Raises MalformedError where the keys are more than one envelope takes."""
    entries = [[w.wrapping_key_id, w.epoch_id, w.expires_ms, w.sealed, w.signature] for w in wrapping_keys]
    if not 0 < len(records) <= MAX_KEYS or len(entries) > MAX_WRAPPING_KEYS:
        raise encoding.MalformedError("outbox rows hold more keys than one envelope takes")
    return encoding.pack({"records": records, "wrapping_keys": entries, "stock": stock})


def check_placed_keys(placed: PlacedKeys) -> None:
    """Checks what the types of the fields do not say. Raises ValueError."""
    key_ids = {record[0] for record in placed.records}
    wrapping_key_ids = {wrapping_key[0] for wrapping_key in placed.wrapping_keys}
    if len(key_ids) < placed.count or len(wrapping_key_ids) < len(placed.wrapping_keys):
        raise ValueError("the same id twice")
    for _, size_bits, _, _, wrapping_key_id, _, sealed in placed.records:
        if wrapping_key_id not in wrapping_key_ids or len(sealed) != size_bits // 8 + _TAG_BYTES:
            raise ValueError("record")


def first_requests(entries: Sequence[Sequence[Any]], place: int) -> tuple[str, ...]:
    """The correlation ids at this place of the first entries, for the log."""
    found = (entry[place] for entry in entries[:MAX_LOGGED_CORRELATION_IDS])
    return tuple(dict.fromkeys(request for request in found if request))
