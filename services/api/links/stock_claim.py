"""Gives out stock: keys that are at the peer already, claimed in one local transaction, without a round trip to it.

The copy is deleted, and that is committed together with the event for the peer, before the answer leaves. A copy that
does not open is deleted too and withdrawn at the peer; its caller gets the next one, or a key on demand.
"""

from __future__ import annotations

import secrets
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sqlalchemy import Connection

from skipbus.services.api.links import IssuedKey
from skipbus.services.api.links.sealing import Opener
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.sealing import KeyRecord
from skipbus.shared.errors import SealBroken, StoreConflict
from skipbus.shared.logging import get_logger
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.store.outbox import TOKEN_BYTES, OutboxRow, fetch_tokens, insert_outbox_rows
from skipbus.shared.store.stock import claim_stock, delete_stock

_log = get_logger("stock")


class StockRequest(NamedTuple):
    """A key of the default size that waits at the KP ``target_id``."""

    target_id: str
    correlation_id: str


def usable_until_ms(at_ms: int, key_ttl_seconds: int) -> int:
    """Until when (UTC ms) a key must live to be given out of stock: the target must have half of a lifetime left."""
    return at_ms + key_ttl_seconds * 500


@dataclass(slots=True)
class _Taken:
    """What one peer's stock gave: entries of its ``key.issued`` event, and of its ``key.withdrawn`` event."""

    issued: list[list[object]] = field(default_factory=list)
    broken: list[list[object]] = field(default_factory=list)


class StockBatch:
    """One transaction that gives out several keys; None stands in the place of a request that found none."""

    def __init__(self, opener: Opener, key_ttl_seconds: int, requests: Sequence[StockRequest]) -> None:
        self._opener = opener
        self._key_ttl_seconds = key_ttl_seconds
        self._requests = requests
        # By token. The server may finish an interrupted commit after the retry has begun, so every attempt is kept.
        self._runs: dict[bytes, Sequence[IssuedKey | None]] = {}

    def run(self, connection: Connection) -> Sequence[IssuedKey | None]:
        """Locks, opens and deletes copies. Raises StoreConflict where fewer were deleted than would be given out."""
        at_ms = now_ms()
        stock = self._claim(connection, at_ms)
        copies = [copy for of_peer in stock.values() for copy in of_peer]  # each is given out or does not open
        self._opener.load(connection, {copy.wrapping_key_id for copy in copies})
        taken: defaultdict[str, _Taken] = defaultdict(_Taken)
        answers = [self._take(r, stock[r.target_id], taken[r.target_id]) for r in self._requests]
        if copies:
            self._delete(connection, copies)
            self._insert(connection, self._events(taken, at_ms), answers)
        else:
            connection.rollback()
        return answers

    def committed(self, connection: Connection) -> Sequence[IssuedKey | None] | None:
        """The token in the outbox proves it, since a run inserts it only after its deletion."""
        found = fetch_tokens(connection, self._runs)
        return next((answers for token, answers in self._runs.items() if token in found), None)

    def _claim(self, connection: Connection, at_ms: int) -> dict[str, list[KeyRecord]]:
        usable_ms = usable_until_ms(at_ms, self._key_ttl_seconds)
        counts = Counter(request.target_id for request in self._requests)
        return {
            peer_id: claim_stock(connection, self._opener.local_id, peer_id, usable_ms, count)
            for peer_id, count in counts.items()
        }

    def _take(self, request: StockRequest, stock: list[KeyRecord], taken: _Taken) -> IssuedKey | None:
        while stock:
            copy = stock.pop()
            try:
                key = self._opener.open(copy, request.target_id.encode())
            except SealBroken as error:
                _log.error(
                    "a key in stock cannot be decrypted",
                    peer=request.target_id,
                    reason=str(error),
                    effect="it is withdrawn, and the next one is used",
                )
                taken.broken.append([copy.key_id, copy.expires_ms, request.correlation_id])
                continue
            taken.issued.append([copy.key_id, copy.size_bits, copy.expires_ms, request.correlation_id])
            return IssuedKey(copy.key_id.hex(), key.hex())
        return None

    def _delete(self, connection: Connection, copies: Sequence[KeyRecord]) -> None:
        if delete_stock(connection, [copy.key_id for copy in copies]) != len(copies):
            # Two nodes of a cluster can lock one row each; only what this transaction deletes may be given out.
            raise StoreConflict("a key in stock was deleted by another transaction")

    def _insert(self, connection: Connection, events: Sequence[OutboxRow], answers: Sequence[IssuedKey | None]) -> None:
        token = secrets.token_bytes(TOKEN_BYTES)
        insert_outbox_rows(connection, [events[0]._replace(token=token), *events[1:]])
        self._runs[token] = answers

    def _events(self, taken: Mapping[str, _Taken], at_ms: int) -> list[OutboxRow]:
        return [
            OutboxRow.of(self._opener.local_id, peer_id, kind, keys, at_ms)
            for peer_id, of_peer in taken.items()
            for kind, keys in (
                (EnvelopeType.KEY_ISSUED, of_peer.issued),
                (EnvelopeType.KEY_WITHDRAWN, of_peer.broken),
            )
            if keys
        ]
