"""Places keys on demand, several in one transaction: the first step, which ``confirmation`` completes.

A ``key.placed`` outbox row holds keys sealed to one peer. The syncer sends it, and deletes it when the peer has
acknowledged it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection

from skipbus.services.api.links import IssuedKey, IssueRequest
from skipbus.services.api.links.sealing import Sealer
from skipbus.services.api.links.store import make_key
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.sealing import KeyRecord, WrappingKey
from skipbus.shared.errors import PeerNotReady, SkipbusError
from skipbus.shared.store.outbox import (
    KEY_PLACED,
    TOKEN_BYTES,
    OutboxRow,
    fetch_tokens,
    insert_outbox_rows,
)

# Keys in one row; an envelope takes 2,000.
MAX_BATCH = 500


@dataclass(slots=True, eq=False)
class Placement:
    """The keys of one ``key.placed`` row: they are confirmed or withdrawn together. ``begun`` is monotonic time.

    ``in_doubt``: this process may have deleted the row, or has answered 500, so a row that is gone proves nothing.
    """

    token: bytes
    peer_id: str
    begun: float
    records: list[KeyRecord] = field(default_factory=list)
    in_doubt: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class PlacedKey:
    """A key on its way to a peer, to be answered once its placement is confirmed. Without a repr: it is a secret."""

    issued: IssuedKey
    placement: Placement


@dataclass(frozen=True, slots=True)
class _Row:
    """What becomes one outbox row."""

    wrapping_key: WrappingKey
    placement: Placement


class PlaceBatch:
    """One transaction that sends several keys on their way."""

    def __init__(self, sealer: Sealer, key_ttl_seconds: int, requests: Sequence[IssueRequest]) -> None:
        self._sealer = sealer
        self._ttl_ms = key_ttl_seconds * 1000
        self._requests = requests
        # By token. The server may finish an interrupted commit after the retry has begun, so every attempt is kept.
        self._runs: dict[bytes, Sequence[PlacedKey | SkipbusError]] = {}

    def run(self, connection: Connection) -> Sequence[PlacedKey | SkipbusError]:
        """Makes and seals a key for each request; PeerNotReady stands in the place of those that cannot be sealed."""
        at_ms = now_ms()
        target_ids = {request.target_id for request in self._requests}
        rows = {target_id: self._new_row(connection, target_id, at_ms) for target_id in target_ids}
        answers = [self._place(request, rows[request.target_id], at_ms) for request in self._requests]
        placements = [row.placement for row in rows.values() if isinstance(row, _Row)]
        insert_outbox_rows(
            connection, [sealed_row(KEY_PLACED, p.peer_id, p.token, p.records, at_ms) for p in placements]
        )
        self._runs |= dict.fromkeys((placement.token for placement in placements), answers)
        return answers

    def committed(self, connection: Connection) -> Sequence[PlacedKey | SkipbusError] | None:
        """A row in the outbox proves it. One that is acknowledged already is not found: callers get new keys."""
        found = fetch_tokens(connection, self._runs)
        return next((answers for token, answers in self._runs.items() if token in found), None)

    def _new_row(self, connection: Connection, target_id: str, at_ms: int) -> _Row | PeerNotReady:
        try:
            wrapping_key = self._sealer.wrapping_key(connection, target_id, at_ms)
        except PeerNotReady as error:
            return error
        # The clock starts before the commit: it must not be behind that of the syncer, which withdraws old rows.
        return _Row(wrapping_key, Placement(secrets.token_bytes(TOKEN_BYTES), target_id, time.monotonic()))

    def _place(self, request: IssueRequest, row: _Row | PeerNotReady, at_ms: int) -> PlacedKey | SkipbusError:
        if isinstance(row, PeerNotReady):
            return row
        record, issued = make_key(request, row.wrapping_key, at_ms + self._ttl_ms)
        row.placement.records.append(record)
        return PlacedKey(issued, row.placement)


def sealed_row(kind: str, peer_id: str, token: bytes, records: Sequence[KeyRecord], at_ms: int) -> OutboxRow:
    """A ``key.placed`` or ``key.stocked`` row that carries these records to the peer that they are sealed to."""
    entries = [
        [r.key_id, r.size_bits, r.expires_ms, r.correlation_id, r.wrapping_key_id, r.nonce, r.sealed] for r in records
    ]
    return OutboxRow.of(records[0].source_id, peer_id, kind, entries, at_ms, token)
