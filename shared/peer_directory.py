"""What one KP knows of the KPs in its store: their verified announcements, and whom it believes to be whom.

Owns the trust decision over a store link: the identity in the first announcement seen under a name is
pinned, in the store for operators to see and in the keyring, which decides; an announcement counts only while it
carries the pinned identity. A changed identity is reported
and refused until an operator accepts it; the earlier announcement is not used meanwhile, because the KP
that could have opened what is sealed to it may be gone.

``refresh`` blocks and belongs in a thread; it reads and verifies only what changed. The reading methods look
at one snapshot that is replaced as a whole, so any thread may call them at any time. While the store is away
the last snapshot stays. Leaves to others: who writes announcements (janitor, syncer) and the SQL
(``shared.store.peers``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Lock

from sqlalchemy import Connection, Engine

from shared.announcements import Announcement, digest, read_announcement
from shared.database import driver_errors
from shared.errors import KeyringError, SealBroken
from shared.identity import fingerprint
from shared.logs import get_logger
from shared.pins import PinBook
from shared.store import peers as peer_store
from shared.store.peers import Pin
from shared.system_ids import RemoteSystemIds

# Pins change only by an operator's hand; while one is awaited they are read at every refresh.
PIN_REREAD_MS = 10_000
CONFLICT_REMINDER_MS = 600_000

log = get_logger(__name__)


@dataclass(frozen=True)
class Conflict:
    """A KP presents another identity than the pinned one (raw ML-DSA-87 public keys)."""

    pinned_key: bytes
    presented_key: bytes


@dataclass(frozen=True)
class _Known:
    """One announcement as it was read; None where its bytes do not verify or name another KP."""

    stored_digest: bytes
    digest: bytes
    announcement: Announcement | None


@dataclass(frozen=True)
class _Snapshot:
    known: Mapping[str, _Known] = field(default_factory=dict)
    pins: Mapping[str, Pin] = field(default_factory=dict)
    conflicts: Mapping[str, Conflict] = field(default_factory=dict)
    peers: tuple[str, ...] = ()

    def usable(self, system_id: str) -> _Known | None:
        """What is known of the KP, when it is verified and carries the pinned identity."""
        known, pin = self.known.get(system_id), self.pins.get(system_id)
        if known is None or known.announcement is None or pin is None:
            return None
        return known if known.announcement.public_key == pin.public_key else None


class PeerDirectory:
    """The announcements and pins that ``local_id`` goes by, its own included."""

    def __init__(
        self, engine: Engine, local_id: str, remote_ids: RemoteSystemIds, pin_book: PinBook | None = None
    ) -> None:
        """``pin_book`` is the keyring's; without one the pins in the store decide."""
        self._pin_book = pin_book
        self._engine = engine
        self._local_id = local_id
        self._remote_ids = remote_ids
        self._refreshing = Lock()
        self._snapshot = _Snapshot(peers=tuple(sorted(remote_ids.exact)))
        self._pins_read_ms = 0
        self._reported: dict[str, tuple[bytes, int]] = {}

    def refresh(self, now_ms: int) -> None:
        """Takes in what changed in the store since the last call. Raises StoreUnavailable, StoreRefused."""
        with self._refreshing:
            with driver_errors(), self._engine.begin() as connection:
                snapshot, pins_read_ms = self._read(connection, now_ms)
            # Only now: a pin that was not committed must not be gone by.
            self._snapshot, self._pins_read_ms = snapshot, pins_read_ms
            self._report_conflicts(now_ms)

    def get(self, system_id: str) -> Announcement | None:
        """The KP's announcement, when it is verified and carries the pinned identity."""
        known = self._snapshot.usable(system_id)
        return known.announcement if known else None

    def digest(self, system_id: str) -> bytes | None:
        """SHA-384 of the announcement's bytes, when ``get`` would return one."""
        known = self._snapshot.usable(system_id)
        return known.digest if known else None

    def pin(self, system_id: str) -> bytes | None:
        """The public key that is believed to be the KP's, whether or not it is announced now."""
        pin = self._snapshot.pins.get(system_id)
        return pin.public_key if pin else None

    def peers(self) -> list[str]:
        """The KPs to talk to: exact ids of the configuration, and whoever is announced that it matches."""
        return list(self._snapshot.peers)

    def allows(self, system_id: str) -> bool:
        """Whether the configuration lets this KP take part: it is remote, or the local one itself."""
        return system_id == self._local_id or system_id in self._remote_ids

    def conflicts(self) -> dict[str, Conflict]:
        """The KPs that present another identity than the pinned one: nothing of theirs is used."""
        return dict(self._snapshot.conflicts)

    def _read(self, connection: Connection, now_ms: int) -> tuple[_Snapshot, int]:
        old = self._snapshot
        known = self._read_known(connection, old.known)
        if known == old.known and not old.conflicts and now_ms - self._pins_read_ms < PIN_REREAD_MS:
            return old, self._pins_read_ms
        stored = peer_store.fetch_pins(connection, self._local_id)
        pins = self._believed(stored)
        for system_id, announcement in _announced(known):
            presented, pin = announcement.public_key, pins.get(system_id) or stored.get(system_id)
            try:
                pins[system_id] = self._settle(connection, system_id, presented, pin, now_ms)
            except KeyringError as error:
                # Without its pin this one peer cannot be trusted; all others go on.
                log.warning("peer not usable", peer=system_id, reason=str(error))
                pins.pop(system_id, None)
        announced = (system_id for system_id in known if system_id in self._remote_ids)
        peers = tuple(sorted(self._remote_ids.exact.union(announced)))
        return _Snapshot(known, pins, _conflicts(known, pins), peers), now_ms

    def _read_known(self, connection: Connection, old: Mapping[str, _Known]) -> dict[str, _Known]:
        digests = peer_store.fetch_announcement_digests(connection)
        known = {}
        for system_id, stored_digest in digests.items():
            if not self.allows(system_id):
                continue
            before = old.get(system_id)
            if before is not None and before.stored_digest == stored_digest:
                known[system_id] = before
            elif (body := peer_store.fetch_announcement(connection, system_id)) is not None:
                known[system_id] = _verified(system_id, stored_digest, body)
        return known

    def _believed(self, stored: Mapping[str, Pin]) -> dict[str, Pin]:
        """The pins that the keyring has too. The local KP's own is the store's: the keyring is compared with it."""
        if self._pin_book is None:
            return dict(stored)
        believed: dict[str, Pin] = {}
        for system_id, pin in stored.items():
            # A damaged file is dealt with where the peer is settled.
            with suppress(KeyringError):
                kept = pin.public_key if system_id == self._local_id else self._pin_book.get(system_id)
                if kept is not None:
                    believed[system_id] = replace(pin, public_key=kept)
        return believed

    def _keep(self, system_id: str, public_key: bytes) -> bytes:
        """Puts a pin into the keyring; the one that the keyring has then."""
        if self._pin_book is None or system_id == self._local_id:
            return public_key
        return self._pin_book.get(system_id) or self._pin_book.learn(system_id, public_key)

    def _settle(self, connection: Connection, system_id: str, presented: bytes, pin: Pin | None, now_ms: int) -> Pin:
        """The pin after this announcement: learned at first sight, otherwise as it was."""
        if pin is None:
            winner = peer_store.insert_pin(connection, self._local_id, system_id, presented, now_ms)
            log.info("identity pinned", peer=system_id, fingerprint=fingerprint(winner))
            pin = Pin(winner, None)
        pin = replace(pin, public_key=self._keep(system_id, pin.public_key))
        if presented not in (pin.public_key, pin.presented_key):
            peer_store.update_presented_key(connection, self._local_id, system_id, presented, now_ms)
            pin = replace(pin, presented_key=presented)
        return pin

    def _report_conflicts(self, now_ms: int) -> None:
        conflicts = self._snapshot.conflicts
        self._reported = {peer: told for peer, told in self._reported.items() if peer in conflicts}
        for system_id, conflict in conflicts.items():
            key, told_ms = self._reported.get(system_id, (b"", 0))
            if key != conflict.presented_key or now_ms - told_ms >= CONFLICT_REMINDER_MS:
                self._reported[system_id] = (conflict.presented_key, now_ms)
                _report(system_id, conflict)


def _announced(known: Mapping[str, _Known]) -> Iterator[tuple[str, Announcement]]:
    return ((k, entry.announcement) for k, entry in known.items() if entry.announcement is not None)


def _conflicts(known: Mapping[str, _Known], pins: Mapping[str, Pin]) -> dict[str, Conflict]:
    return {
        system_id: Conflict(pins[system_id].public_key, announcement.public_key)
        for system_id, announcement in _announced(known)
        if system_id in pins and announcement.public_key != pins[system_id].public_key
    }


def _verified(system_id: str, stored_digest: bytes, body: bytes) -> _Known:
    """The announcement in a row; a row that does not verify is remembered too, so that it is read once."""
    announcement, fault = None, "it names another system id than its row"
    try:
        announcement = read_announcement(body)
    except SealBroken as error:
        fault = str(error)
    if announcement is None or announcement.system_id != system_id:
        log.warning("announcement refused", peer=system_id, error=fault)
        announcement = None
    return _Known(stored_digest, digest(body), announcement)


def _report(system_id: str, conflict: Conflict) -> None:
    log.error(
        "identity changed: refused until an operator accepts it",
        peer=system_id,
        pinned=fingerprint(conflict.pinned_key),
        presented=fingerprint(conflict.presented_key),
        command=f"skipctl identity accept {system_id}",
    )
