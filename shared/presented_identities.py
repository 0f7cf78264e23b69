"""Other identities than the trusted ones: presented under the names of peers, stored and reported for the operator.

Nothing that such an identity signs is used, and presenting one takes nothing from the peer itself, because everybody
who can publish can present an identity. So a new one is noted once a minute for each peer, and forgotten after three.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from sqlalchemy import Connection

from skipbus.shared.crypto.identity import fingerprint
from skipbus.shared.logging import get_logger
from skipbus.shared.store.pinned_identities import Pin, upsert_presented

CONFLICT_REMINDER_MS = 600_000
PRESENTED_EVERY_MS = 60_000
PRESENTED_KEPT_MS = 3 * PRESENTED_EVERY_MS

log = get_logger("shared.peer_directory")


@dataclass(frozen=True)
class Conflict:
    """A KP presents another identity than the pinned one (raw ML-DSA-87 public keys)."""

    pinned_key: bytes
    presented_key: bytes
    configured: bool = False


@dataclass(slots=True)
class _Presented:
    key: bytes
    at_ms: int
    stored: bool = False


class PresentedIdentities:
    """Of bus peers, whose identities are configured. ``configured`` are their pins."""

    def __init__(self, local_id: str, configured: Mapping[str, Pin], bus_ids: Collection[str]) -> None:
        self._local_id = local_id
        self._configured = {k: pin for k, pin in configured.items() if k in bus_ids}
        self._presented: dict[str, _Presented] = {}

    def __bool__(self) -> bool:
        return bool(self._presented)

    def note(self, system_id: str, public_key: bytes, now_ms: int) -> None:
        """An envelope under a bus peer's name was signed by this identity. From any thread."""
        pin, before = self._configured.get(system_id), self._presented.get(system_id)
        if pin is None or pin.public_key == public_key:
            return
        if before is None or now_ms - before.at_ms >= PRESENTED_EVERY_MS:
            self._presented[system_id] = _Presented(public_key, now_ms)

    def store(self, connection: Connection, now_ms: int) -> list[_Presented]:
        """Stores those that are new; they are to be marked as ``stored`` after the commit."""
        written: list[_Presented] = []
        for system_id, one in list(self._presented.items()):
            if now_ms - one.at_ms >= PRESENTED_KEPT_MS:
                del self._presented[system_id]
            elif not one.stored:
                configured = self._configured[system_id].public_key
                upsert_presented(connection, self._local_id, system_id, configured, one.key, one.at_ms)
                written.append(one)
        return written

    def recent(self, stored: Mapping[str, Pin], now_ms: int) -> Iterator[tuple[str, bytes]]:
        """What any process of this KP has stored lately: system id and presented key."""
        for system_id in self._configured.keys() & stored.keys():
            pin = stored[system_id]
            if pin.presented_key is not None and now_ms - (pin.presented_ms or 0) < PRESENTED_KEPT_MS:
                yield system_id, pin.presented_key


class ConflictReporter:
    """Logs each conflict at first, and again every ten minutes."""

    def __init__(self) -> None:
        self._reported: dict[str, tuple[bytes, int]] = {}

    def report(self, conflicts: Mapping[str, Conflict], now_ms: int) -> None:
        """These are the conflicts now."""
        self._reported = {peer: last for peer, last in self._reported.items() if peer in conflicts}
        for system_id, conflict in conflicts.items():
            key, reported_ms = self._reported.get(system_id, (b"", 0))
            if key != conflict.presented_key or now_ms - reported_ms >= CONFLICT_REMINDER_MS:
                self._reported[system_id] = (conflict.presented_key, now_ms)
                _report(system_id, conflict)


def _report(system_id: str, conflict: Conflict) -> None:
    pinned, presented = fingerprint(conflict.pinned_key), fingerprint(conflict.presented_key)
    if conflict.configured:
        log.error(
            "identity differs from the configured one: refused until the TOML file has it",
            peer=system_id,
            configured=pinned,
            presented=presented,
            command=f"skipctl peer check {system_id}",
        )
        return
    log.error(
        "identity changed: refused until an operator accepts it",
        peer=system_id,
        pinned=pinned,
        presented=presented,
        command=f"skipctl identity accept {system_id}",
    )
