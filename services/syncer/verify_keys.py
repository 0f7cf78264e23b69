"""Verifies sealed keys at their target, which checks what can be checked without opening them.

A record that the target acknowledges must be one that it can serve: made for the two KPs of the envelope's header,
sealed under a wrapping key that the source signed for an epoch whose private half the target still has, and with a
lifetime that fits. A signature is verified once, not for each envelope that brings the same wrapping key.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import lru_cache

from skipbus.shared.crypto.epochs import MAX_CLOCK_SKEW_MS
from skipbus.shared.crypto.identity import CONTEXT_WRAPPING_KEY, verify
from skipbus.shared.crypto.sealing import SealedWrappingKey
from skipbus.shared.errors import EnvelopeRefused, SealBroken
from skipbus.shared.protocol.envelopes import Header
from skipbus.shared.protocol.placed_keys import PlacedKeys

# The longest lifetime that can be configured.
MAX_LIFETIME_MS = 7 * 86_400_000


class OwnEpochs:
    """Which epochs the local KP can open: those that it has announced, as long as their private halves are kept.

    An epoch leaves the announcement when it ends, and keys that were sealed to it a moment before are still in transit.
    So what was announced is remembered here; after a restart the keyring's file names show it, without the time span.
    """

    def __init__(self, in_keyring: Callable[[], Collection[bytes]]) -> None:
        self._in_keyring = in_keyring
        self._destroy_ms: dict[bytes, int] = {}

    def note(self, epochs: Iterable[tuple[bytes, int]], now_ms: int) -> None:
        """These are announced now: epoch id and when the private half is destroyed (UTC ms)."""
        self._destroy_ms.update(epochs)
        self._destroy_ms = {k: destroy_ms for k, destroy_ms in self._destroy_ms.items() if destroy_ms > now_ms}

    def has(self, epoch_id: bytes, until_ms: int) -> bool:
        """Whether what is sealed to it can be opened until then (UTC ms)."""
        destroy_ms = self._destroy_ms.get(epoch_id)
        return epoch_id in self._in_keyring() if destroy_ms is None else until_ms <= destroy_ms


def verify_keys(
    header: Header, placed: PlacedKeys, sender_public_key: bytes, epochs: OwnEpochs, now_ms: int, *, bus_peer: bool
) -> None:
    """Returns where the target can serve these keys; ``bus_peer`` says that the sender is one.

    Raises EnvelopeRefused: not_a_bus_peer, unknown_epoch, bad_seal, bad_lifetime.
    """
    if not bus_peer:
        raise EnvelopeRefused(
            "not_a_bus_peer", f"{header.sender} sent sealed keys and is no peer over a bus in this configuration"
        )
    for wrapping_key in placed.sealed_wrapping_keys(header):
        if not epochs.has(wrapping_key.epoch_id, wrapping_key.expires_ms):
            raise EnvelopeRefused(
                "unknown_epoch",
                f"{header.sender} sealed keys to an epoch that {header.target} does not have, or for longer than it is "
                "kept: they could not be opened",
            )
        _verify_wrapping_key(wrapping_key, sender_public_key)
    _check_lifetimes(header, placed, now_ms)


@lru_cache(maxsize=1024)
def _verify_wrapping_key(wrapping_key: SealedWrappingKey, sender_public_key: bytes) -> None:
    """Errors are not cached."""
    try:
        verify(sender_public_key, wrapping_key.signature, wrapping_key.signed_bytes(), CONTEXT_WRAPPING_KEY)
    except SealBroken as error:
        raise EnvelopeRefused("bad_seal", f"a wrapping key is not signed by {wrapping_key.source_id}") from error


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
