"""Sealed keys on their way to a bus peer: in the payload of an outbox row, and with their wrapping keys in an envelope.

Pure. The target cannot open what it is sent; ``services.syncer.verify`` checks what can be checked without
opening.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from skipbus.shared.crypto.epochs import EPOCH_ID_BYTES
from skipbus.shared.crypto.sealing import WRAPPING_KEY_ID_BYTES, KeyRecord, SealedWrappingKey
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import Header
from skipbus.shared.protocol.keys import KEY_ID_BYTES, MAX_KEY_BITS, MIN_KEY_BITS

# Keys that one envelope may store, delete or release at its receiver, which does so in one transaction.
MAX_KEYS = 2_000
MAX_WRAPPING_KEYS = 64
MAX_SEALED_WRAPPING_KEY_BYTES = 2_048
SIGNATURE_BYTES = 4_627
MAX_KEY_ID_BYTES = 64
MAX_CORRELATION_ID = 64
MAX_NUMBER = 2**63
MAX_LOGGED_CORRELATION_IDS = 20
_NONCE_BYTES = 12
_TAG_BYTES = 16


@dataclass(frozen=True, slots=True)
class PlacedKeys:
    """``key.issued`` over a bus link: sealed keys and the wrapping keys that they need; ``stock``: ahead of need."""

    records: Sequence[list[Any]] = field(repr=False)
    wrapping_keys: Sequence[list[Any]] = field(repr=False)
    stock: bool

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


def pack_records(records: Iterable[KeyRecord]) -> bytes:
    """The payload of an outbox row with sealed keys."""
    return encoding.pack(
        [[r.key_id, r.size_bits, r.expires_ms, r.correlation_id, r.wrapping_key_id, r.nonce, r.sealed] for r in records]
    )


def pack_placed_keys(records: Sequence[list[Any]], wrapping_keys: Iterable[SealedWrappingKey], *, stock: bool) -> bytes:
    """The payload of an envelope. Raises MalformedError where the keys are more than one envelope takes."""
    entries = [[w.wrapping_key_id, w.epoch_id, w.expires_ms, w.sealed, w.signature] for w in wrapping_keys]
    if not 0 < len(records) <= MAX_KEYS or len(entries) > MAX_WRAPPING_KEYS:
        raise encoding.MalformedError("outbox rows hold more keys than one envelope takes")
    return encoding.pack({"records": records, "wrapping_keys": entries, "stock": stock})


def read_placed_keys(value: dict[str, Any]) -> PlacedKeys:
    """The keys in an unpacked payload. Raises ValueError, TypeError, KeyError where it is malformed."""
    records, wrapping_keys, stock = value["records"], value["wrapping_keys"], value["stock"]
    require(isinstance(records, list) and 0 < len(records) <= MAX_KEYS)
    require(isinstance(wrapping_keys, list) and 0 < len(wrapping_keys) <= MAX_WRAPPING_KEYS)
    require(isinstance(stock, bool))
    for wrapping_key in wrapping_keys:
        _check_wrapping_key(wrapping_key)
    for record in records:
        _check_record(record)
    known = {wrapping_key[0] for wrapping_key in wrapping_keys}
    require(len(known) == len(wrapping_keys))
    require(len({record[0] for record in records}) == len(records))
    require(all(record[4] in known for record in records))
    return PlacedKeys(records, wrapping_keys, stock)


def _check_record(record: object) -> None:
    if not isinstance(record, list):
        raise TypeError("record")
    key_id, size_bits, expires_ms, correlation_id, wrapping_key_id, nonce, sealed = record
    require(isinstance(key_id, bytes) and KEY_ID_BYTES <= len(key_id) <= MAX_KEY_ID_BYTES)
    require(type(size_bits) is int and MIN_KEY_BITS <= size_bits <= MAX_KEY_BITS and size_bits % 8 == 0)
    require(is_natural(expires_ms) and expires_ms > 0)
    require(isinstance(correlation_id, str) and len(correlation_id) <= MAX_CORRELATION_ID)
    # The column is ASCII; a text that MySQL refuses would delay the whole queue.
    require(correlation_id.isascii() and (correlation_id.isprintable() or not correlation_id))
    require(isinstance(wrapping_key_id, bytes) and len(wrapping_key_id) == WRAPPING_KEY_ID_BYTES)
    require(isinstance(nonce, bytes) and len(nonce) == _NONCE_BYTES)
    require(isinstance(sealed, bytes) and len(sealed) == size_bits // 8 + _TAG_BYTES)


def _check_wrapping_key(wrapping_key: object) -> None:
    if not isinstance(wrapping_key, list):
        raise TypeError("wrapping key")
    wrapping_key_id, epoch_id, expires_ms, sealed, signature = wrapping_key
    require(isinstance(wrapping_key_id, bytes) and len(wrapping_key_id) == WRAPPING_KEY_ID_BYTES)
    require(isinstance(epoch_id, bytes) and len(epoch_id) == EPOCH_ID_BYTES)
    require(is_natural(expires_ms) and expires_ms > 0)
    require(isinstance(sealed, bytes) and 0 < len(sealed) <= MAX_SEALED_WRAPPING_KEY_BYTES)
    require(isinstance(signature, bytes) and len(signature) == SIGNATURE_BYTES)


def first_requests(entries: Sequence[list[Any]], place: int) -> tuple[str, ...]:
    """The correlation ids at this place of the first entries, for the log."""
    found = (entry[place] for entry in entries[:MAX_LOGGED_CORRELATION_IDS])
    return tuple(dict.fromkeys(request for request in found if request))


def is_natural(value: Any) -> bool:  # noqa: ANN401 -- anything may come from a peer
    """Whether it is an integer that every column of the store holds."""
    return type(value) is int and 0 <= value < MAX_NUMBER


def require(condition: bool) -> None:
    """Raises ValueError."""
    if not condition:
        raise ValueError("payload")
