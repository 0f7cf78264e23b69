"""Confirms keys on demand, or withdraws them. No thread and no connection is held by a caller who waits.

A row that is gone means that the peer has the keys, unless they were withdrawn: an api that gives up deletes the row in
the transaction that queries it, and the syncer withdraws a row whose api has died after three times the timeout. So
nothing counts as placed after twice the timeout, whatever the store says then. A notification that a row is
acknowledged or rejected is the reason to query the store; without one each placement is polled once a second. If the
store is away at the timeout, the caller is answered 500, and the keys are withdrawn when the store is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from enum import Enum
from itertools import islice
from typing import NamedTuple

from sqlalchemy import Connection

from skipbus.services.api import metrics
from skipbus.services.api.group_commit import GroupCommit
from skipbus.services.api.links.placing import Placement
from skipbus.shared.clock import now_ms
from skipbus.shared.errors import NotPlaced, Overloaded, SkipbusError, StoreConflict, StoreUnavailable
from skipbus.shared.logging import get_logger
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.store.outbox import (
    OutboxRow,
    delete_rows,
    fetch_rows_of_tokens,
    fetch_tokens,
    insert_outbox_rows,
)

_POLL_SECONDS = 1.0
# Of the sync timeout.
_LATE_AFTER_TIMEOUTS = 2
# Withdrawals that wait for the store. The syncer withdraws what is more than that.
_MAX_OUTSTANDING = 10_000
_OUTSTANDING_TOGETHER = 500
# Kept notifications for which no caller waits here: another process's, or they came before the commit was answered.
_MAX_EARLY = 2_000

_log = get_logger("confirmation")


class PlacementStatus(Enum):
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

    def run(self, connection: Connection) -> Sequence[PlacementStatus]:
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
    ) -> PlacementStatus:
        placement = request.placement
        if placement in withdrawn:
            return PlacementStatus.WITHDRAWN
        if not request.withdraw and (placement.token in waiting or self._proves_nothing(placement)):
            return PlacementStatus.WAITING
        return PlacementStatus.PLACED

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


def _withdrawn_rows(local_id: str, placements: Iterable[Placement]) -> list[OutboxRow]:
    keys: defaultdict[str, list[list[object]]] = defaultdict(list)
    for placement in placements:
        keys[placement.peer_id] += [[r.key_id, r.expires_ms, r.correlation_id] for r in placement.records]
    return [
        OutboxRow.of(local_id, peer_id, EnvelopeType.KEY_WITHDRAWN, of_peer, now_ms())
        for peer_id, of_peer in keys.items()
    ]


class _Wait:
    """The wait for one placement, which its callers share."""

    def __init__(self, placement: Placement, *, rejected: bool | None) -> None:
        """``rejected`` is None where there was no notification yet."""
        self.placement = placement
        self.rejected = bool(rejected)
        self.notified = asyncio.Event()
        if rejected is not None:
            self.notified.set()

    async def wait_for_notification(self, seconds: float) -> None:
        """Returns after a notification, or after so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.notified.wait()
        self.notified.clear()


class ConfirmationWaiter:
    """Not thread-safe: use it on one event loop. ``queue`` runs ``ConfirmBatch``."""

    def __init__(
        self, queue: GroupCommit[ConfirmRequest, PlacementStatus], sync_timeout_seconds: float, max_callers: int
    ) -> None:
        self._queue = queue
        self._timeout_seconds = sync_timeout_seconds
        self._max_callers = max_callers
        self._callers = 0
        self._waits: dict[bytes, tuple[_Wait, asyncio.Task[PlacementStatus]]] = {}
        self._early: dict[bytes, bool] = {}
        self._outstanding: dict[bytes, Placement] = {}
        self._withdrawn: Counter[tuple[str, str]] = Counter()

    def check_room(self) -> None:
        """Raises Overloaded where as many callers wait as may: a peer that is away must not gather all of them."""
        if self._callers >= self._max_callers:
            raise Overloaded("too many requests wait for the other key provider; try again")

    async def confirm(self, placement: Placement) -> None:
        """Returns once the peer has the keys. Raises NotPlaced once they are withdrawn, StoreUnavailable otherwise."""
        wait, task = self._waits.get(placement.token) or self._begin(placement)
        self._callers += 1
        try:
            # One caller who leaves must not end the wait of the others.
            outcome = await asyncio.shield(task)
        finally:
            self._callers -= 1
        if outcome is PlacementStatus.WITHDRAWN:
            raise self._not_placed(wait)
        if outcome is PlacementStatus.WAITING:
            raise StoreUnavailable("the key store did not say whether the other key provider has the key")

    def acknowledged(self, tokens: Sequence[bytes]) -> None:
        """A notification says that the peer has acknowledged these rows."""
        self._notified(tokens, rejected=False)

    def rejected(self, tokens: Sequence[bytes]) -> None:
        """A notification says that the peer has rejected these rows: they are withdrawn unless they are placed."""
        self._notified(tokens, rejected=True)

    async def tick(self) -> None:
        """Once a second: reports withdrawals, and does those that wait for the store. Raises SkipbusError."""
        # Each caller has its own line in the access log; this one is for an operator who watches the peers.
        withdrawn, self._withdrawn = self._withdrawn, Counter()
        for (peer_id, reason), count in withdrawn.items():
            _log.warning("keys withdrawn", peer=peer_id, count=count, reason=reason)
        # No more than the queue has room for, or the queue would refuse some of them every time.
        while some := list(islice(self._outstanding.values(), min(_OUTSTANDING_TOGETHER, self._max_callers))):
            await self._withdraw_together(some)

    async def _withdraw_together(self, placements: Sequence[Placement]) -> None:
        """Raises the first error, after it has noted what is withdrawn: that must not be withdrawn again."""
        submitted = (self._queue.submit(ConfirmRequest(placement, withdraw=True)) for placement in placements)
        results = await asyncio.gather(*submitted, return_exceptions=True)
        for placement, result in zip(placements, results, strict=True):
            if isinstance(result, PlacementStatus):
                del self._outstanding[placement.token]
                self._count_withdrawn(placement, "the store was away")
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def close(self) -> None:
        """Ends all waits; the syncer withdraws what is not acknowledged."""
        for _, task in self._waits.values():
            task.cancel()

    def _notified(self, tokens: Sequence[bytes], *, rejected: bool) -> None:
        for token in tokens:
            if token in self._waits:
                wait, _ = self._waits[token]
                wait.rejected |= rejected
                wait.notified.set()
                continue
            self._early[token] = rejected
            if len(self._early) > _MAX_EARLY:
                del self._early[next(iter(self._early))]

    def _begin(self, placement: Placement) -> tuple[_Wait, asyncio.Task[PlacementStatus]]:
        wait = _Wait(placement, rejected=self._early.pop(placement.token, None))
        begun = self._waits[placement.token] = wait, asyncio.create_task(self._outcome(wait), name="confirmation")
        return begun

    async def _outcome(self, wait: _Wait) -> PlacementStatus:
        try:
            return PlacementStatus.PLACED if await self._is_placed_in_time(wait) else await self._withdraw(wait)
        finally:
            del self._waits[wait.placement.token]

    async def _is_placed_in_time(self, wait: _Wait) -> bool:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_seconds
        while (left_seconds := deadline - loop.time()) > 0 and not wait.rejected:
            await wait.wait_for_notification(min(left_seconds, _POLL_SECONDS))
            if await self._is_placed(wait.placement, deadline):
                return True
        return False

    async def _is_placed(self, placement: Placement, deadline: float) -> bool:
        # A store that is away is not asked for longer than the caller waits; the withdrawal will meet it anyway.
        with contextlib.suppress(TimeoutError, SkipbusError):
            async with asyncio.timeout_at(deadline):
                return await self._queue.submit(ConfirmRequest(placement)) is PlacementStatus.PLACED
        return False

    async def _withdraw(self, wait: _Wait) -> PlacementStatus:
        placement = wait.placement
        try:
            outcome = await self._queue.submit(ConfirmRequest(placement, withdraw=True))
        except SkipbusError as error:
            _log.debug("placement in doubt", peer=placement.peer_id, reason=str(error))
            placement.in_doubt = True
            if len(self._outstanding) < _MAX_OUTSTANDING:
                self._outstanding[placement.token] = placement
            return PlacementStatus.WAITING
        if outcome is PlacementStatus.WITHDRAWN:
            self._count_withdrawn(placement, "rejected" if wait.rejected else "not stored in time")
        return outcome

    def _count_withdrawn(self, placement: Placement, reason: str) -> None:
        self._withdrawn[placement.peer_id, reason] += len(placement.records)
        metrics.count_withdrawn(placement.peer_id, len(placement.records))

    def _not_placed(self, wait: _Wait) -> NotPlaced:
        peer_id = wait.placement.peer_id
        if wait.rejected:
            return NotPlaced(f"key provider {peer_id} refused the key; it is withdrawn (see /status/sync for why)")
        return NotPlaced(
            f"key provider {peer_id} has not stored the key within {self._timeout_seconds:g} s; it is withdrawn"
        )
