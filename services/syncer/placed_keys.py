"""Sealed keys in a ``key.issued`` envelope: how they are written, read, and judged by their target. Pure.

The target cannot open what it is sent here: its syncer has no use for a key in clear. It checks what can be checked
without opening, so that a record which it acknowledges can be served: made for the two KPs of the envelope's header,
sealed under a wrapping key that the source signed for an epoch whose private half the target still has, and of a
lifetime that fits. What is signed once is not verified again for each envelope that uses it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from skipbus.shared.crypto.epochs import EPOCH_ID_BYTES, MAX_CLOCK_SKEW_MS
from skipbus.shared.crypto.identity import CONTEXT_WRAPPING_KEY, verify
from skipbus.shared.crypto.sealing import WRAPPING_KEY_ID_BYTES, KeyRecord, SealedWrappingKey
from skipbus.shared.errors import EnvelopeRefused, SealBroken
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import Header
from skipbus.shared.protocol.keys import KEY_ID_BYTES, MAX_KEY_BITS, MIN_KEY_BITS

MAX_RECORDS = 2_000
MAX_WRAPPING_KEYS = 64
# The longest lifetime that can be configured.
MAX_LIFETIME_MS = 7 * 86_400_000
MAX_SEALED_WRAPPING_KEY_BYTES = 2_048
SIGNATURE_BYTES = 4_627
_MAX_KEY_ID_BYTES = 64
_MAX_CORRELATION_ID = 64
_NONCE_BYTES = 12
_TAG_BYTES = 16
_MAX_TIME_MS = 2**63
_VERIFIED_KEPT = 4_096


@dataclass(frozen=True, slots=True)
class PlacedKeys:
    """Records and the wrapping keys that they need, as they stand in the payload; ``stock`` for keys ahead of need."""

    records: tuple[list[Any], ...]
    wrapping_keys: tuple[list[Any], ...]
    stock: bool

    def key_records(self, header: Header) -> list[KeyRecord]:
        """The records as the target stores them: from the envelope's sender, for its target."""
        return [
            KeyRecord(key_id, header.sender, header.target, size_bits, expires_ms, wrapping_key_id, nonce, sealed, told)
            for key_id, size_bits, expires_ms, told, wrapping_key_id, nonce, sealed in self.records
        ]

    def sealed_wrapping_keys(self, header: Header) -> list[SealedWrappingKey]:
        """The wrapping keys: from the envelope's sender, for its target."""
        return [
            SealedWrappingKey(wrapping_key_id, header.sender, header.target, epoch_id, expires_ms, sealed, signature)
            for wrapping_key_id, epoch_id, expires_ms, sealed, signature in self.wrapping_keys
        ]

    @property
    def correlation_ids(self) -> tuple[str, ...]:
        """The first requests that the keys came from."""
        return tuple(dict.fromkeys(record[3] for record in self.records[:20] if record[3]))


def pack_placed_keys(records: list[Any], wrapping_keys: Iterable[SealedWrappingKey], *, stock: bool) -> bytes:
    """The payload. Raises MalformedError where these are more than one envelope takes."""
    entries = [[w.wrapping_key_id, w.epoch_id, w.expires_ms, w.sealed, w.signature] for w in wrapping_keys]
    if not 0 < len(records) <= MAX_RECORDS or len(entries) > MAX_WRAPPING_KEYS:
        raise encoding.MalformedError("outbox rows hold more keys than one envelope takes")
    return encoding.pack({"records": records, "wrapping_keys": entries, "stock": stock})


def read_placed_keys(value: dict[str, Any]) -> PlacedKeys:
    """The keys in an unpacked payload. Raises ValueError, TypeError, KeyError where it is malformed."""
    records, wrapping_keys, stock = value["records"], value["wrapping_keys"], value["stock"]
    _require(isinstance(records, list) and 0 < len(records) <= MAX_RECORDS)
    _require(isinstance(wrapping_keys, list) and 0 < len(wrapping_keys) <= MAX_WRAPPING_KEYS)
    _require(isinstance(stock, bool))
    for wrapping_key in wrapping_keys:
        _check_wrapping_key(wrapping_key)
    for record in records:
        _check_record(record)
    known = {wrapping_key[0] for wrapping_key in wrapping_keys}
    _require(len(known) == len(wrapping_keys))
    _require(len({record[0] for record in records}) == len(records))
    _require(all(record[4] in known for record in records))
    return PlacedKeys(tuple(records), tuple(wrapping_keys), stock)


def _check_record(record: object) -> None:
    if not isinstance(record, list):
        raise TypeError("record")
    key_id, size_bits, expires_ms, correlation_id, wrapping_key_id, nonce, sealed = record
    _require(isinstance(key_id, bytes) and KEY_ID_BYTES <= len(key_id) <= _MAX_KEY_ID_BYTES)
    _require(type(size_bits) is int and MIN_KEY_BITS <= size_bits <= MAX_KEY_BITS and size_bits % 8 == 0)
    _require(type(expires_ms) is int and 0 < expires_ms < _MAX_TIME_MS)
    _require(isinstance(correlation_id, str) and len(correlation_id) <= _MAX_CORRELATION_ID)
    # They are stored as ASCII; a text that MySQL refuses would hold up the whole queue.
    _require(correlation_id.isascii() and (correlation_id.isprintable() or not correlation_id))
    _require(isinstance(wrapping_key_id, bytes) and len(wrapping_key_id) == WRAPPING_KEY_ID_BYTES)
    _require(isinstance(nonce, bytes) and len(nonce) == _NONCE_BYTES)
    _require(isinstance(sealed, bytes) and len(sealed) == size_bits // 8 + _TAG_BYTES)


def _check_wrapping_key(wrapping_key: object) -> None:
    if not isinstance(wrapping_key, list):
        raise TypeError("wrapping key")
    wrapping_key_id, epoch_id, expires_ms, sealed, signature = wrapping_key
    _require(isinstance(wrapping_key_id, bytes) and len(wrapping_key_id) == WRAPPING_KEY_ID_BYTES)
    _require(isinstance(epoch_id, bytes) and len(epoch_id) == EPOCH_ID_BYTES)
    _require(type(expires_ms) is int and 0 < expires_ms < _MAX_TIME_MS)
    _require(isinstance(sealed, bytes) and 0 < len(sealed) <= MAX_SEALED_WRAPPING_KEY_BYTES)
    _require(isinstance(signature, bytes) and len(signature) == SIGNATURE_BYTES)


class PlacedKeysJudge:
    """Decides for one target whether sealed keys can be served from here; remembers signatures it has verified."""

    def __init__(self, is_bus_peer: Callable[[str], bool], own_epochs: OwnEpochs) -> None:
        """``own_epochs`` are the local KP's."""
        self._is_bus_peer = is_bus_peer
        self._own_epochs = own_epochs
        self._verified: OrderedDict[bytes, None] = OrderedDict()

    def check(self, header: Header, placed: PlacedKeys, sender_public_key: bytes, now_ms: int) -> None:
        """Raises EnvelopeRefused: not_a_bus_peer, unknown_epoch, bad_seal, bad_lifetime."""
        if not self._is_bus_peer(header.sender):
            raise EnvelopeRefused(
                "not_a_bus_peer", f"{header.sender} sent sealed keys and is no peer over a bus in this configuration"
            )
        for wrapping_key in placed.sealed_wrapping_keys(header):
            self._check_wrapping_key(wrapping_key, sender_public_key)
        _check_lifetimes(header, placed, now_ms)

    def _check_wrapping_key(self, wrapping_key: SealedWrappingKey, sender_public_key: bytes) -> None:
        if not self._own_epochs.has(wrapping_key.epoch_id, wrapping_key.expires_ms):
            raise EnvelopeRefused(
                "unknown_epoch",
                f"{wrapping_key.source_id} sealed keys to an epoch that {wrapping_key.target_id} does not have, or for "
                "longer than it is kept: they could not be opened",
            )
        signed = wrapping_key.signed_bytes()
        told = hashlib.sha384(len(signed).to_bytes(4, "big") + signed + wrapping_key.signature + sender_public_key)
        known = told.digest()
        if known in self._verified:
            self._verified.move_to_end(known)
            return
        try:
            verify(sender_public_key, wrapping_key.signature, signed, CONTEXT_WRAPPING_KEY)
        except SealBroken as error:
            raise EnvelopeRefused("bad_seal", f"a wrapping key is not signed by {wrapping_key.source_id}") from error
        self._verified[known] = None
        if len(self._verified) > _VERIFIED_KEPT:
            self._verified.popitem(last=False)


def _check_lifetimes(header: Header, placed: PlacedKeys, now_ms: int) -> None:
    until_ms = {wrapping_key[0]: wrapping_key[2] for wrapping_key in placed.wrapping_keys}
    latest_ms = now_ms + MAX_LIFETIME_MS + MAX_CLOCK_SKEW_MS
    for record in placed.records:
        expires_ms = record[2]
        if expires_ms <= now_ms:
            ago_seconds = (now_ms - expires_ms) // 1000
            raise EnvelopeRefused("bad_lifetime", f"{header.sender} sent a key that expired {ago_seconds} s ago")
        if expires_ms > until_ms[record[4]] or expires_ms > latest_ms:
            raise EnvelopeRefused("bad_lifetime", f"{header.sender} sent a key that would outlive what opens it")


class OwnEpochs:
    """Which epochs the local KP can open: those that it has announced, as long as their private halves are kept.

    An epoch leaves the announcement when it ends, and keys that were sealed to it a moment before are still on their
    way. So what was announced is remembered here; after a restart the keyring's file names tell, without the span.
    """

    def __init__(self, in_keyring: Callable[[], Collection[bytes]]) -> None:
        self._in_keyring = in_keyring
        self._destroy_ms: dict[bytes, int] = {}

    def note(self, epochs: Iterable[tuple[bytes, int]], now_ms: int) -> None:
        """These are announced now: epoch id and when the private half is destroyed (UTC ms)."""
        self._destroy_ms.update(epochs)
        for epoch_id in [known for known, destroy_ms in self._destroy_ms.items() if destroy_ms <= now_ms]:
            del self._destroy_ms[epoch_id]

    def has(self, epoch_id: bytes, until_ms: int) -> bool:
        """Whether what is sealed to it can be opened until then (UTC ms)."""
        destroy_ms = self._destroy_ms.get(epoch_id)
        if destroy_ms is not None:
            return until_ms <= destroy_ms
        return epoch_id in self._in_keyring()


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError("payload")
