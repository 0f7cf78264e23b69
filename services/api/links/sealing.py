"""The wrapping keys in use: those that this KP seals with, and those of its peers that it has opened.

A sealer or an opener belongs to one queue and is used in its thread; only ``forget_ended`` may be called from another.
No wrapping key is held for longer than its epoch's private half exists: ``forget_ended`` is called every second.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection

from skipbus.shared.crypto.epochs import EpochSpan, PublicEpoch, current_epoch
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.crypto.sealing import (
    MAX_SEALS,
    KeyRecord,
    SealedWrappingKey,
    WrappingKey,
    make_wrapping_key,
    open_wrapping_key,
)
from skipbus.shared.errors import KeyringError, PeerNotReady, SealBroken
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol.announcements import Announcement
from skipbus.shared.store.wrapping_keys import fetch_sealed_wrapping_keys, insert_wrapping_keys


@dataclass(slots=True)
class _InUse:
    """A wrapping key for a target: used during ``span`` for as long as the target has announced nothing else."""

    key: WrappingKey
    announcement: Announcement
    span: EpochSpan


class Sealer:
    """The wrapping keys that this KP seals with: one for each target and epoch."""

    def __init__(self, local_id: str, identity: Identity, directory: PeerDirectory) -> None:
        self.local_id = local_id
        self._identity = identity
        self._directory = directory
        self._in_use: dict[str, _InUse] = {}

    def wrapping_key(self, connection: Connection, target_id: str, at_ms: int) -> WrappingKey:
        """The wrapping key for the target's epoch at ``at_ms`` (UTC). Raises PeerNotReady.

        A new one is committed to the store, in a transaction of its own, before anything is sealed with it. To be
        called before the transaction that stores what is sealed.
        """
        held = self._held(target_id, at_ms)
        if held is not None:
            return held
        announcement = self._announcement(target_id)
        epoch = _epoch_at(announcement, at_ms)
        key, sealed = make_wrapping_key(self._identity, self.local_id, target_id, epoch)
        insert_wrapping_keys(connection, [sealed])
        connection.commit()
        self._in_use[target_id] = _InUse(key, announcement, epoch.span)
        return key

    def forget_ended(self, at_ms: int) -> None:
        """Drops wrapping keys whose epoch's private half is destroyed by now."""
        for target_id, in_use in list(self._in_use.items()):
            if in_use.key.expires_ms <= at_ms:
                self._in_use.pop(target_id, None)

    def _held(self, target_id: str, at_ms: int) -> WrappingKey | None:
        announcement = self._announcement(target_id)
        in_use = self._in_use.get(target_id)
        if in_use is None or in_use.key.seals >= MAX_SEALS:
            return None
        if in_use.announcement is not announcement or not in_use.span.starts_ms <= at_ms < in_use.span.ends_ms:
            epoch = _epoch_at(announcement, at_ms)
            if in_use.key.epoch_id != epoch.epoch_id:
                return None
            in_use.announcement, in_use.span = announcement, epoch.span
        return in_use.key

    def _announcement(self, target_id: str) -> Announcement:
        announcement = self._directory.get(target_id)
        if announcement is None:
            raise not_usable(self._directory, target_id)
        return announcement


class Opener:
    """The wrapping keys of peers that this KP has opened, one for each epoch and source."""

    def __init__(self, keyring: Keyring, directory: PeerDirectory) -> None:
        self.local_id = keyring.system_id
        self._keyring = keyring
        self._directory = directory
        self._opened: dict[bytes, WrappingKey] = {}
        self._broken: dict[bytes, str] = {}

    def load(self, connection: Connection, wrapping_key_ids: Iterable[bytes]) -> None:
        """Fetches and opens those that are not open yet. What does not open is reported by ``open``."""
        missing = {wrapping_key_id for wrapping_key_id in wrapping_key_ids if wrapping_key_id not in self._opened}
        # What failed before may work now: an operator has accepted an identity.
        self._broken = {}
        for sealed in fetch_sealed_wrapping_keys(connection, missing) if missing else ():
            try:
                self._opened[sealed.wrapping_key_id] = self._open(sealed)
            except SealBroken as error:
                self._broken[sealed.wrapping_key_id] = str(error)

    def open(self, record: KeyRecord, context: bytes = b"") -> bytes:
        """The key in a record whose wrapping key was loaded. Raises SealBroken."""
        wrapping_key = self._opened.get(record.wrapping_key_id)
        if wrapping_key is None:
            missing = "the wrapping key of a key record is not in the store"
            raise SealBroken(self._broken.get(record.wrapping_key_id, missing))
        return wrapping_key.open(record, context)

    def forget_ended(self, at_ms: int) -> None:
        """Drops wrapping keys whose epoch's private half is destroyed by now."""
        for wrapping_key_id, wrapping_key in list(self._opened.items()):
            if wrapping_key.expires_ms <= at_ms:
                self._opened.pop(wrapping_key_id, None)

    def _open(self, sealed: SealedWrappingKey) -> WrappingKey:
        source_public_key = self._directory.pin(sealed.source_id)
        if source_public_key is None:
            raise SealBroken(f"no identity is pinned for key provider {sealed.source_id}")
        try:
            epoch = self._keyring.read_epoch(sealed.epoch_id)
        except KeyringError as error:
            raise SealBroken(str(error)) from error
        return open_wrapping_key(sealed, source_public_key, epoch.private_key)


def _epoch_at(announcement: Announcement, at_ms: int) -> PublicEpoch:
    epoch = current_epoch(announcement.epochs, at_ms)
    if epoch is None:
        raise PeerNotReady(
            f"key provider {announcement.system_id} has no epoch for the present time: its janitor has been away for "
            "too long, or the clocks differ"
        )
    return epoch


def not_usable(directory: PeerDirectory, target_id: str) -> PeerNotReady:
    """The refusal for a KP that the list allows, and that has not announced itself or has changed its identity."""
    conflict = directory.conflicts().get(target_id)
    if conflict is not None and conflict.configured:
        return PeerNotReady(
            f"key provider {target_id} presents another identity than the one that is configured for it: no key is "
            "sealed to it until its entry in [[peers]] is corrected"
        )
    if conflict is not None:
        return PeerNotReady(
            f"key provider {target_id} presents another identity than the pinned one: no key is sealed to it until "
            "an operator accepts that (skipctl identity accept)"
        )
    if directory.is_bus_peer(target_id):
        return PeerNotReady(
            f"no announcement of key provider {target_id} has come over the bus yet: no key can be sealed to it "
            f"(skipctl peer check {target_id})"
        )
    return PeerNotReady(
        f"key provider {target_id} has not announced itself: no key can be sealed to it until it has started "
        "once over this store"
    )
