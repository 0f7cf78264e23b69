"""The transactions of keys on demand: several keys are placed, confirmed or withdrawn at a time.

A ``key.placed`` outbox row holds keys sealed to one peer. The syncer sends it and deletes it when the peer has
acknowledged it. So a row that is gone means that the peer has the keys, unless they were withdrawn: an api that gives
up deletes the row in the transaction that queries it, and the syncer withdraws a row whose api has died after three
times the timeout. Therefore nothing counts as placed after twice the timeout, whatever the store says then.
"""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from sqlalchemy import Connection

from skipbus.services.api.links import IssuedKey, IssueRequest
from skipbus.services.api.links.sealing import Sealer
from skipbus.services.api.links.store import make_key
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.sealing import KeyRecord, WrappingKey
from skipbus.shared.errors import PeerNotReady, SkipbusError, StoreConflict
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.store.outbox import (
    KEY_PLACED,
    OutboxRow,
    delete_rows,
    fetch_rows_of_tokens,
    fetch_tokens,
    insert_outbox_rows,
)

# Keys in one row; an envelope takes 2,000.
MAX_BATCH = 500
TOKEN_BYTES = 16
# Of the sync timeout.
_LATE_AFTER_TIMEOUTS = 2

WithdrawnKey = tuple[bytes, int, str]
"""keyId, expiry (UTC ms) and correlation id."""


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
        # By token, of all runs: an interrupted commit may land late, when the next run is on its way.
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
        """A row in the outbox proves it. One that is acknowledged already is not found: no caller gets its keys."""
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


class Outcome(Enum):
    """How a placement stands."""

    WAITING = "waiting"
    PLACED = "placed"
    WITHDRAWN = "withdrawn"


class ConfirmRequest(NamedTuple):
    """Asks how a placement stands. With ``withdraw`` it is withdrawn unless it is placed."""

    placement: Placement
    withdraw: bool = False


class ConfirmBatch:
    """One transaction that confirms several placements, and withdraws some of them."""

    def __init__(self, local_id: str, sync_timeout_seconds: float, requests: Sequence[ConfirmRequest]) -> None:
        self._local_id = local_id
        self._late_after_seconds = _LATE_AFTER_TIMEOUTS * sync_timeout_seconds
        self._requests = requests

    def run(self, connection: Connection) -> Sequence[Outcome]:
        """How each placement stands. Raises StoreConflict."""
        waiting = fetch_tokens(connection, [r.placement.token for r in self._requests if not r.withdraw])
        withdrawn = self._withdraw(connection, [r.placement for r in self._requests if r.withdraw])
        if not withdrawn:
            connection.rollback()
        return [self._outcome(request, waiting, withdrawn) for request in self._requests]

    def committed(self, _connection: Connection) -> None:
        """Not known. ``run`` is tried again: what it has tried to withdraw is withdrawn then, row or no row."""

    def _outcome(
        self, request: ConfirmRequest, waiting: Collection[bytes], withdrawn: Collection[Placement]
    ) -> Outcome:
        placement = request.placement
        if placement in withdrawn:
            return Outcome.WITHDRAWN
        if not request.withdraw and (placement.token in waiting or self._proves_nothing(placement)):
            return Outcome.WAITING
        return Outcome.PLACED

    def _withdraw(self, connection: Connection, placements: Sequence[Placement]) -> set[Placement]:
        row_ids = {
            token: row_id for row_id, token, _ in fetch_rows_of_tokens(connection, [p.token for p in placements])
        }
        withdrawn = {p for p in placements if p.token in row_ids or self._proves_nothing(p)}
        for placement in withdrawn:
            # Now, whatever becomes of this transaction: after an interrupted commit the row may be gone because of it.
            placement.in_doubt = True
        if delete_rows(connection, list(row_ids.values())) != len(row_ids):
            raise StoreConflict("an outbox row was deleted by another transaction")
        insert_outbox_rows(connection, _withdrawn_rows(self._local_id, withdrawn))
        return withdrawn

    def _proves_nothing(self, placement: Placement) -> bool:
        """Whether the placement's row may be gone although the peer has not acknowledged it."""
        return placement.in_doubt or time.monotonic() - placement.begun > self._late_after_seconds


def sealed_row(kind: str, peer_id: str, token: bytes, records: Sequence[KeyRecord], at_ms: int) -> OutboxRow:
    """A ``key.placed`` or ``key.stocked`` row that carries these records to the peer that they are sealed to."""
    entries = [
        [r.key_id, r.size_bits, r.expires_ms, r.correlation_id, r.wrapping_key_id, r.nonce, r.sealed] for r in records
    ]
    return OutboxRow(records[0].source_id, peer_id, kind, encoding.pack(entries), len(entries), at_ms, token)


def withdrawn_row(local_id: str, peer_id: str, keys: Sequence[WithdrawnKey], at_ms: int) -> OutboxRow:
    """The event by which a peer learns that these keys are withdrawn."""
    return OutboxRow(local_id, peer_id, EnvelopeType.KEY_WITHDRAWN.value, encoding.pack(keys), len(keys), at_ms)


def _withdrawn_rows(local_id: str, placements: Iterable[Placement]) -> list[OutboxRow]:
    keys: defaultdict[str, list[WithdrawnKey]] = defaultdict(list)
    for placement in placements:
        keys[placement.peer_id] += [(r.key_id, r.expires_ms, r.correlation_id) for r in placement.records]
    return [withdrawn_row(local_id, peer_id, of_peer, now_ms()) for peer_id, of_peer in keys.items()]
