"""Makes epochs ahead of time, announces them, and destroys those whose last key has expired.

Order: an epoch's private half is on disk before it is announced, so that no key is sealed to an epoch that a crash
could remove.
"""

from __future__ import annotations

from contextlib import suppress

from sqlalchemy import Engine

from skipbus.shared.crypto.epochs import PublicEpoch, longest_life_ms, missing_spans, new_epoch_id
from skipbus.shared.crypto.hpke import HybridPrivateKey
from skipbus.shared.crypto.keyring import Keyring, PrivateEpoch, check_pinned_identity
from skipbus.shared.errors import KeyringError
from skipbus.shared.logging import get_logger
from skipbus.shared.protocol.announcements import Announcement, digest, sign_announcement
from skipbus.shared.settings import Settings
from skipbus.shared.store.announcements import fetch_announcement_issued_ms, upsert_announcement
from skipbus.shared.store.engine import driver_errors
from skipbus.shared.store.pinned_identities import insert_pin

ALGORITHM = "MLKEM1024-P384"

_KEYS_LOST = "requests for keys that are sealed to it answer 500 until these keys expire"

_log = get_logger("epochs")


class EpochKeeper:
    """Keeps the keyring's epochs and the KP's announcement in the store up to date."""

    def __init__(self, settings: Settings, engine: Engine, keyring: Keyring) -> None:
        self._settings = settings
        self._engine = engine
        self._keyring = keyring
        self._epochs: dict[bytes, PublicEpoch] = {}
        self._unreadable: set[bytes] = set()
        self._announced: frozenset[bytes] | None = None
        self._digest = b""

    def tend(self, now_ms: int, *, list_files: bool) -> None:
        """Destroys ended epochs and makes missing ones. Needs no store. Raises KeyringError, OperatorError.

        Without ``list_files`` the folder is not listed unless an epoch is to be destroyed: listing is the largest cost,
        and only the elected janitor writes there.
        """
        if list_files or any(epoch.span.destroy_ms <= now_ms for epoch in self._epochs.values()):
            self._read_new_files()
        self._destroy_ended(now_ms)
        self._make_missing(now_ms)

    def _read_new_files(self) -> None:
        present = set(self._keyring.epoch_ids())
        self._unreadable &= present
        for gone in self._epochs.keys() - present:
            del self._epochs[gone]
        for epoch_id in present - self._epochs.keys():
            try:
                self._epochs[epoch_id] = self._keyring.read_epoch(epoch_id).public()
            except KeyringError as error:
                # One damaged file must not prevent new epochs; keys sealed to this epoch are lost.
                if epoch_id not in self._unreadable:
                    _log.warning("epoch cannot be read", epoch=epoch_id.hex(), reason=str(error), effect=_KEYS_LOST)
                self._unreadable.add(epoch_id)
            else:
                self._unreadable.discard(epoch_id)

    def _destroy_ended(self, now_ms: int) -> None:
        for epoch_id, epoch in list(self._epochs.items()):
            if epoch.span.destroy_ms <= now_ms:
                self._keyring.destroy_epoch(epoch_id)
                del self._epochs[epoch_id]
                _log.info("epoch destroyed", epoch=epoch_id.hex(), ended_ms=epoch.span.ends_ms)

        # An unreadable file may still be a private half: it is destroyed when no key sealed to it can be valid.
        longest_ms = longest_life_ms(self._settings.epoch_seconds, self._settings.key_ttl_seconds)
        for epoch_id in list(self._unreadable):
            if self._keyring.epoch_written_ms(epoch_id) + longest_ms <= now_ms:
                # Another user's file cannot be destroyed; this must not prevent new epochs.
                with suppress(OSError):
                    self._keyring.destroy_epoch(epoch_id)
                    self._unreadable.discard(epoch_id)
                    _log.info("unreadable epoch destroyed", epoch=epoch_id.hex())

    def _make_missing(self, now_ms: int) -> None:
        spans = missing_spans(
            [epoch.span for epoch in self._epochs.values()],
            now_ms,
            self._settings.epoch_seconds,
            self._settings.key_ttl_seconds,
        )
        for span in spans:
            epoch = PrivateEpoch(new_epoch_id(), span, HybridPrivateKey.generate())
            self._keyring.write_epoch(epoch)
            self._epochs[epoch.epoch_id] = epoch.public()
        if spans:
            _log.info("epochs made", count=len(spans), from_ms=spans[0].starts_ms, until_ms=spans[-1].ends_ms)

    def announce(self, now_ms: int, stored_digest: bytes | None) -> None:
        """Announces the epochs that ``tend`` has left, unless the stored announcement has the same digest.

        Raises KeyringError, StoreUnavailable, StoreRefused.
        """
        usable = {i: epoch for i, epoch in self._epochs.items() if epoch.span.ends_ms > now_ms}
        current = frozenset(usable)
        # The store may have been emptied, or an old announcement restored.
        if current == self._announced and stored_digest == self._digest:
            return
        epochs = tuple(sorted(usable.values(), key=lambda epoch: epoch.span.starts_ms))
        with driver_errors(), self._engine.begin() as connection:
            local_id = self._settings.local_system_id
            # Always newer than the stored one, even if this host's clock was set back.
            issued_ms = max(now_ms, fetch_announcement_issued_ms(connection, local_id) + 1)
            public_key = self._keyring.identity.public_key
            announcement = Announcement(local_id, public_key, issued_ms, ALGORITHM, epochs)
            body = sign_announcement(announcement, self._keyring.identity)
            pinned = insert_pin(connection, local_id, local_id, announcement.public_key, now_ms)
            check_pinned_identity(self._keyring, pinned)
            upsert_announcement(connection, announcement, body)
        self._announced, self._digest = current, digest(body)
        _log.info("announced", epochs=len(usable), octets=len(body))
