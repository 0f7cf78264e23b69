"""On demand over a bus link: places keys at a peer, and settles for each whether it is there or is taken back.

A batch commits one ``key.placed`` outbox row for each peer, with the keys sealed to it. The syncer carries it, and the
row goes when the peer has acknowledged. So "the row is gone" is what may be answered with 200, and it is always looked
up in the store: a notification is only the reason to look.

Who gives up takes the row away in the same transaction that looks for it. Either it was there: then the keys are
withdrawn, and told to the peer, which may have them already. Or it was gone: then they are placed. A row whose api has
died is withdrawn by the syncer after three times the timeout. Therefore nothing is answered here with 200 after twice
the timeout, whatever the store says then: the keys are withdrawn once more and the caller is told 500.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from skipbus.services.api.issuing import Sealer, no_entropy
from skipbus.services.api.links import IssuedKey, IssueRequest
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.sealing import KeyRecord, SealedWrappingKey, WrappingKey
from skipbus.shared.errors import SkipbusError
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.protocol.keys import new_key_id
from skipbus.shared.store.packets import OutboxRow
from skipbus.shared.store.placing import (
    KEY_PLACED,
    commit_placing,
    commit_withdrawn,
    delete_held,
    fetch_for_withdrawal,
    fetch_waiting_tokens,
)
from skipbus.shared.store.steps import Steps

# Records in one row; an envelope takes 2,000.
MAX_BATCH = 500
_TOKEN_BYTES = 16
# Of the sync timeout. The syncer withdraws what nobody has settled after three of them.
LATE_AFTER_TIMEOUTS = 2


class Outcome(Enum):
    """How a placement stands."""

    WAITING = "waiting"
    PLACED = "placed"
    WITHDRAWN = "withdrawn"


@dataclass(slots=True, eq=False)
class Placement:
    """The keys of one ``key.placed`` row: the row's token, and what a withdrawal says of the keys.

    ``outcome`` is there once it is settled, ``refused`` where the peer is said to have refused it.
    """

    token: bytes
    peer_id: str
    begun: float
    keys: list[tuple[bytes, int, str]] = field(default_factory=list)
    outcome: Outcome | None = None
    refused: bool = False

    def is_late(self, sync_timeout_seconds: float) -> bool:
        """Whether the syncer may be about to withdraw the row, so that its absence no longer means "placed"."""
        return time.monotonic() - self.begun > LATE_AFTER_TIMEOUTS * sync_timeout_seconds


@dataclass(frozen=True, slots=True, repr=False)
class PlacedKey:
    """A key on its way to a peer, to be answered once its placement is settled. Without a repr: it is a secret."""

    issued: IssuedKey
    placement: Placement


class _WrappingKeyInUse(Protocol):
    """What a sealer hands out: the key, and its sealed form for as long as the store may not have it."""

    key: WrappingKey
    unstored: SealedWrappingKey | None


@dataclass(slots=True)
class _Row:
    """What becomes one outbox row; all of it under one wrapping key."""

    current: _WrappingKeyInUse
    placement: Placement
    records: list[KeyRecord] = field(default_factory=list)


class PlaceBatch:
    """One transaction that sends several keys on their way."""

    def __init__(self, sealer: Sealer, key_ttl_seconds: int, requests: Sequence[IssueRequest]) -> None:
        self._sealer = sealer
        self._ttl_ms = key_ttl_seconds * 1000
        self._requests = requests
        # Each run's tokens and answers: an interrupted commit may land late, when the next run is on its way.
        self._runs: list[tuple[set[bytes], list[PlacedKey | SkipbusError]]] = []

    def run(self) -> Steps[Sequence[PlacedKey | SkipbusError]]:
        """Makes, seals and commits a key for each request; an error stands in the place of those that cannot."""
        at_ms, rows = now_ms(), dict[str, _Row]()
        # Before any clock of a placement starts: it may take a thread.
        used = yield from self._sealer.load({request.target_id for request in self._requests}, at_ms)
        answers = [self._place_one(request, at_ms, rows, used) for request in self._requests]
        if not rows:
            return answers
        self._runs.append(({row.placement.token for row in rows.values()}, answers))
        unstored = [row.current.unstored for row in rows.values() if row.current.unstored]
        outbox_rows = [self._outbox_row(row, at_ms) for row in rows.values()]
        yield from commit_placing(unstored, outbox_rows)
        for row in rows.values():
            row.current.unstored = None
        return answers

    def committed(self) -> Steps[Sequence[PlacedKey | SkipbusError] | None]:
        """The answers of an interrupted commit that happened: its tokens then stand in the outbox."""
        waiting = yield from fetch_waiting_tokens(set().union(*(tokens for tokens, _ in self._runs)))
        return next((answers for tokens, answers in self._runs if tokens & waiting), None)

    def _place_one(
        self, request: IssueRequest, at_ms: int, rows: dict[str, _Row], used: Mapping[str, _WrappingKeyInUse]
    ) -> PlacedKey | SkipbusError:
        try:
            row = rows.get(request.target_id) or self._new_row(request.target_id, at_ms, used)
            key_id, key = new_key_id(), os.urandom(request.size_bits // 8)
        except SkipbusError as error:
            return error
        except OSError as error:
            refusal = no_entropy()
            refusal.__cause__ = error
            return refusal
        rows[request.target_id] = row
        # A record must not outlive the private half that opens it.
        expires_ms = min(at_ms + self._ttl_ms, row.current.key.expires_ms)
        row.records.append(row.current.key.seal(key_id, key, expires_ms, request.correlation_id))
        row.placement.keys.append((key_id, expires_ms, request.correlation_id))
        return PlacedKey(IssuedKey(key_id.hex(), key.hex()), row.placement)

    def _new_row(self, peer_id: str, at_ms: int, used: Mapping[str, _WrappingKeyInUse]) -> _Row:
        # Asking the sealer raises for all but a peer that has become usable since.
        current = used.get(peer_id) or self._sealer.wrapping_key_for(peer_id, at_ms)
        # The clock starts before the commit: what matters is that it starts no later than the syncer's.
        placement = Placement(secrets.token_bytes(_TOKEN_BYTES), peer_id, time.monotonic())
        return _Row(current, placement)

    def _outbox_row(self, row: _Row, at_ms: int) -> OutboxRow:
        placement = row.placement
        payload = pack_records(row.records)
        local_id, items = self._sealer.local_id, len(row.records)
        return OutboxRow(local_id, placement.peer_id, KEY_PLACED, payload, items, at_ms, placement.token)


def pack_records(records: Iterable[KeyRecord]) -> bytes:
    """The payload of a ``key.placed`` or ``key.stocked`` row."""
    return encoding.pack(
        [[r.key_id, r.size_bits, r.expires_ms, r.correlation_id, r.wrapping_key_id, r.nonce, r.sealed] for r in records]
    )


def withdrawn_row(local_id: str, peer_id: str, keys: Sequence[tuple[bytes, int, str]], at_ms: int) -> OutboxRow:
    """Tells a peer that these keys (keyId, expiry in UTC ms, correlation id) are taken back."""
    payload = encoding.pack([list(key) for key in keys])
    return OutboxRow(local_id, peer_id, EnvelopeType.KEY_WITHDRAWN.value, payload, len(keys), at_ms)


@dataclass(frozen=True, slots=True)
class Check:
    """Is it placed?"""

    placement: Placement


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Take it back, unless it is placed; ``certainly``: even then, because its caller was told 500 already."""

    placement: Placement
    certainly: bool = False


@dataclass(frozen=True, slots=True)
class Release:
    """Keys were handed out here: they are their source's waiting stock no more."""

    source_id: str
    key_ids: tuple[bytes, ...]


Settlement = Check | Withdraw | Release


class SettleBatch:
    """One look at several placements, and one transaction for those that are given up."""

    def __init__(self, local_id: str, sync_timeout_seconds: float, requests: Sequence[Settlement]) -> None:
        self._local_id = local_id
        self._sync_timeout_seconds = sync_timeout_seconds
        self._requests = requests
        self._tried: set[bytes] = set()

    def run(self) -> Steps[Sequence[Outcome | SkipbusError]]:
        """The outcome of each; a release is always PLACED."""
        checks = [r.placement.token for r in self._requests if isinstance(r, Check)]
        waiting = (yield from fetch_waiting_tokens(checks)) if checks else set[bytes]()
        withdrawn = yield from self._withdraw([r for r in self._requests if isinstance(r, Withdraw)])
        yield from self._release([r for r in self._requests if isinstance(r, Release)])
        return [self._outcome(request, waiting, withdrawn) for request in self._requests]

    def committed(self) -> Steps[None]:
        """Not known: ``run`` can be done again. What it may have withdrawn before is withdrawn then in any case."""
        yield from ()

    def _outcome(self, request: Settlement, waiting: set[bytes], withdrawn: set[bytes]) -> Outcome:
        match request:
            case Check(placement):
                sure = placement.token not in waiting and not placement.is_late(self._sync_timeout_seconds)
                return Outcome.PLACED if sure else Outcome.WAITING
            case Withdraw(placement) if placement.token in withdrawn:
                return Outcome.WITHDRAWN
            case _:
                return Outcome.PLACED

    def _withdraw(self, requests: Sequence[Withdraw]) -> Steps[set[bytes]]:
        if not requests:
            return set()
        found = yield from fetch_for_withdrawal({request.placement.token for request in requests})
        given_up = {r.placement.token: r.placement for r in requests if self._is_given_up(r, found)}
        # After an interrupted commit the rows may be gone by our own hand: that must not look like "placed".
        self._tried |= found
        yield from commit_withdrawn(found, self._rows(given_up.values()))
        return set(given_up)

    def _is_given_up(self, request: Withdraw, found: set[bytes]) -> bool:
        placement = request.placement
        return (
            placement.token in found
            or request.certainly
            or placement.token in self._tried
            or placement.is_late(self._sync_timeout_seconds)
        )

    def _rows(self, placements: Iterable[Placement]) -> list[OutboxRow]:
        keys: dict[str, list[tuple[bytes, int, str]]] = {}
        for placement in placements:
            keys.setdefault(placement.peer_id, []).extend(placement.keys)
        at_ms = now_ms()
        return [withdrawn_row(self._local_id, peer_id, of_peer, at_ms) for peer_id, of_peer in keys.items()]

    def _release(self, requests: Sequence[Release]) -> Steps[None]:
        by_source: dict[str, list[bytes]] = {}
        for request in requests:
            by_source.setdefault(request.source_id, []).extend(request.key_ids)
        if by_source:
            yield from delete_held(self._local_id, by_source)
