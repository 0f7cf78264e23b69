"""A KP's directory of peers: their verified announcements, and which identity is trusted for each of them.

A peer with a configured identity is trusted by that identity only. For any other peer the identity in the first
announcement under its name is pinned (trust on first use), in the keyring, which decides, and in the store, for
operators. An announcement counts only with the pinned identity. A changed identity is reported and refused until an
operator accepts it; the earlier announcement is not used in the meantime, because its KP may be gone. Announcements of
bus peers come only from their envelopes, all others only from the store, so that who can write to one of the two cannot
speak for a KP of the other. ``refresh`` blocks; readers use a snapshot that is replaced as a whole, from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TypeVar

from sqlalchemy import Connection, Engine

from skipbus.shared.crypto.identity import fingerprint
from skipbus.shared.crypto.pins import PinBook
from skipbus.shared.errors import KeyringError, SealBroken
from skipbus.shared.logging import get_logger
from skipbus.shared.presented_identities import Conflict, ConflictReporter, PresentedIdentities
from skipbus.shared.protocol.announcements import Announcement, digest, read_announcement
from skipbus.shared.protocol.system_ids import RemoteSystemIds
from skipbus.shared.settings.peers import PeerSettings
from skipbus.shared.store import announcements, pinned_identities
from skipbus.shared.store.engine import driver_errors
from skipbus.shared.store.pinned_identities import Pin

# Only operators change pins. During a conflict they are read at every refresh.
PIN_REREAD_MS = 10_000
T = TypeVar("T")

log = get_logger("shared.peer_directory")


@dataclass(frozen=True)
class _Known:
    """One stored announcement; None if its bytes do not verify or name another KP."""

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
        """The entry of the KP, if it is verified and has the pinned identity."""
        known, pin = self.known.get(system_id), self.pins.get(system_id)
        if known is None or known.announcement is None or pin is None:
            return None
        return known if known.announcement.public_key == pin.public_key else None


class PeerDirectory:
    """The announcements and pins that ``local_id`` uses, its own included."""

    def __init__(
        self,
        engine: Engine,
        local_id: str,
        remote_ids: RemoteSystemIds,
        pin_book: PinBook,
        peers: Mapping[str, PeerSettings],
    ) -> None:
        """``pin_book`` is the keyring's. ``peers`` are the configured ones."""
        self._pin_book = pin_book
        self._configured = {k: Pin(peer.identity, None) for k, peer in peers.items() if peer.identity}
        self._bus_ids = frozenset(k for k, peer in peers.items() if peer.link == "bus")
        self._named = remote_ids.exact.union(peers)
        self._presented = PresentedIdentities(local_id, self._configured, self._bus_ids)
        self._reporter = ConflictReporter()
        self._engine = engine
        self._local_id = local_id
        self._remote_ids = remote_ids
        self._refreshing = Lock()
        self._snapshot = _Snapshot(pins=dict(self._configured), peers=tuple(sorted(self._named)))
        self._pins_read_ms = 0

    def refresh(self, now_ms: int) -> None:
        """Reads what changed in the store since the last call. Raises StoreUnavailable, StoreRefused."""
        self.refresh_with(now_ms, lambda _connection: None)

    def refresh_with(self, now_ms: int, query: Callable[[Connection], T]) -> T:
        """``refresh``, after another query in the same transaction, whose result is returned.

        An idle process spends most of its time on round trips to the store, so that what is read every second is read
        together.
        """
        with self._refreshing:
            with driver_errors(), self._engine.begin() as connection:
                result = query(connection)
                presented = self._presented.store(connection, now_ms)
                snapshot, pins_read_ms = self._read(connection, now_ms)
            # Only after the commit: an uncommitted pin must not be used.
            self._snapshot, self._pins_read_ms = snapshot, pins_read_ms
            for one in presented:
                one.stored = True
            self._reporter.report(snapshot.conflicts, now_ms)
        return result

    def get(self, system_id: str) -> Announcement | None:
        """The KP's announcement, if it is verified and has the pinned identity."""
        known = self._snapshot.usable(system_id)
        return known.announcement if known else None

    def digest(self, system_id: str) -> bytes | None:
        """SHA-384 of the announcement's bytes, if ``get`` returns one."""
        known = self._snapshot.usable(system_id)
        return known.digest if known else None

    def pin(self, system_id: str) -> bytes | None:
        """The trusted public key of the KP, announced or not."""
        pin = self._snapshot.pins.get(system_id)
        return pin.public_key if pin else None

    def peers(self) -> list[str]:
        """The peers: exact ids of the configuration, and announced KPs that it matches."""
        return list(self._snapshot.peers)

    def allows(self, system_id: str) -> bool:
        """Whether the configuration names this KP or matches it, or it is the local one."""
        return system_id == self._local_id or system_id in self._named or system_id in self._remote_ids

    def is_bus_peer(self, system_id: str) -> bool:
        """Whether the KP is reached over a bus, and has a store of its own."""
        return system_id in self._bus_ids

    def conflicts(self) -> dict[str, Conflict]:
        """The KPs that present another identity than the pinned one; nothing signed by that identity is used."""
        return dict(self._snapshot.conflicts)

    def note_presented(self, system_id: str, public_key: bytes, now_ms: int) -> None:
        """Notes that an envelope under a bus peer's name was signed by another identity than the configured one.

        The next ``refresh`` reports it and stores it for the operator. It does not affect the peer itself, because
        everybody who can publish can present an identity.
        """
        self._presented.note(system_id, public_key, now_ms)

    def _read(self, connection: Connection, now_ms: int) -> tuple[_Snapshot, int]:
        old = self._snapshot
        known = self._read_known(connection, old.known)
        quiet = not old.conflicts and not self._presented
        if quiet and known == old.known and now_ms - self._pins_read_ms < PIN_REREAD_MS:
            return old, self._pins_read_ms
        stored = pinned_identities.fetch_pins(connection, self._local_id)
        pins = self._trusted(stored) | self._configured
        for system_id, announcement in _announced(known):
            presented, pin = announcement.public_key, pins.get(system_id) or stored.get(system_id)
            if system_id in self._bus_ids:
                continue
            if system_id in self._configured:
                self._note_configured(connection, system_id, presented, stored.get(system_id), now_ms)
                continue
            try:
                pins[system_id] = self._pin(connection, system_id, presented, pin, now_ms)
            except KeyringError as error:
                # Without its pin this peer cannot be trusted; the others are not affected.
                log.warning("peer not usable", peer=system_id, reason=str(error))
                pins.pop(system_id, None)
        announced = (system_id for system_id in known if system_id in self._remote_ids)
        peers = tuple(sorted(self._named.union(announced)))
        # A bus peer's announcement was signed by the identity configured at that time: an old one is no conflict.
        claims = [(k, one.public_key) for k, one in _announced(known) if k not in self._bus_ids]
        claims += self._presented.recent(stored, now_ms)
        return _Snapshot(known, pins, self._conflicts(claims, pins), peers), now_ms

    def _read_known(self, connection: Connection, old: Mapping[str, _Known]) -> dict[str, _Known]:
        known = {}
        for system_id, stored_digest in self._read_digests(connection).items():
            before = old.get(system_id)
            if before is not None and before.stored_digest == stored_digest:
                known[system_id] = before
            elif (body := self._read_body(connection, system_id)) is not None:
                known[system_id] = _verified(system_id, stored_digest, body)
        return known

    def _read_digests(self, connection: Connection) -> dict[str, bytes]:
        """The digests of all relevant KPs, each from the place where its announcements are stored."""
        found = announcements.fetch_announcement_digests(connection)
        # Without bus peers the account has no right to that table.
        sent = announcements.fetch_bus_announcement_digests(connection, self._local_id) if self._bus_ids else {}
        relevant = {k: found[k] for k in found if k not in self._bus_ids and self.allows(k)}
        return relevant | {k: sent[k] for k in sent if k in self._bus_ids}

    def _read_body(self, connection: Connection, system_id: str) -> bytes | None:
        if system_id in self._bus_ids:
            return announcements.fetch_bus_announcement(connection, self._local_id, system_id)
        return announcements.fetch_announcement(connection, system_id)

    def _trusted(self, stored: Mapping[str, Pin]) -> dict[str, Pin]:
        """The pins that are also in the keyring. The local KP's own pin is the store's."""
        trusted: dict[str, Pin] = {}
        for system_id, pin in stored.items():
            # `_pin` handles a damaged file.
            with suppress(KeyringError):
                kept = pin.public_key if system_id == self._local_id else self._pin_book.get(system_id)
                if kept is not None:
                    trusted[system_id] = replace(pin, public_key=kept)
        return trusted

    def _keep(self, system_id: str, public_key: bytes) -> bytes:
        """Writes a pin to the keyring, and returns the keyring's pin."""
        if system_id == self._local_id:
            return public_key
        return self._pin_book.get(system_id) or self._pin_book.learn(system_id, public_key)

    def _pin(self, connection: Connection, system_id: str, presented: bytes, pin: Pin | None, now_ms: int) -> Pin:
        """The pin after this announcement: a new one on first use, otherwise the existing one."""
        if pin is None:
            winner = pinned_identities.insert_pin(connection, self._local_id, system_id, presented, now_ms)
            log.info("identity pinned", peer=system_id, fingerprint=fingerprint(winner))
            pin = Pin(winner, None)
        pin = replace(pin, public_key=self._keep(system_id, pin.public_key))
        if presented not in (pin.public_key, pin.presented_key):
            pinned_identities.update_presented_key(connection, self._local_id, system_id, presented, now_ms)
            pin = replace(pin, presented_key=presented)
        return pin

    def _note_configured(
        self, connection: Connection, system_id: str, announced: bytes, stored: Pin | None, now_ms: int
    ) -> None:
        """Stores for the operator that a peer announces another identity than the configured one."""
        configured = self._configured[system_id].public_key
        if announced != configured and (stored is None or stored.presented_key != announced):
            pinned_identities.upsert_presented(connection, self._local_id, system_id, configured, announced, now_ms)

    def _conflicts(self, claims: Iterable[tuple[str, bytes]], pins: Mapping[str, Pin]) -> dict[str, Conflict]:
        return {
            system_id: Conflict(pins[system_id].public_key, key, system_id in self._configured)
            for system_id, key in claims
            if system_id in pins and key != pins[system_id].public_key
        }


def _announced(known: Mapping[str, _Known]) -> Iterator[tuple[str, Announcement]]:
    return ((k, entry.announcement) for k, entry in known.items() if entry.announcement is not None)


def _verified(system_id: str, stored_digest: bytes, body: bytes) -> _Known:
    """The verified announcement of a row; a row that does not verify is kept too, so that it is read only once."""
    announcement, fault = None, "it names another system id than its row"
    try:
        announcement = read_announcement(body)
    except SealBroken as error:
        fault = str(error)
    if announcement is None or announcement.system_id != system_id:
        log.warning("announcement refused", peer=system_id, error=fault)
        announcement = None
    return _Known(stored_digest, digest(body), announcement)
