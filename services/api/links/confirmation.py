"""The wait for the confirmation of keys on demand. No thread and no connection is held by a caller who waits.

A notification that a row is acknowledged or rejected is the reason to query the store; without one each placement is
polled once a second. At the timeout, or when the peer has rejected the keys, they are withdrawn. If the store
does not answer then, the caller is answered 500 immediately, and the keys are withdrawn when the store is back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Sequence
from itertools import islice

from skipbus.services.api import metrics
from skipbus.services.api.group_commit import GroupCommit
from skipbus.services.api.links.placing import ConfirmRequest, Outcome, Placement
from skipbus.shared.errors import NotPlaced, Overloaded, SkipbusError, StoreUnavailable
from skipbus.shared.logging import get_logger

_POLL_SECONDS = 1.0
# Withdrawals that wait for the store; beyond this the syncer's own withdrawal has to do.
_MAX_OUTSTANDING = 10_000
_OUTSTANDING_TOGETHER = 500
# Notifications about rows that no caller here waits for: another process's, or faster than the answer to the commit.
_MAX_EARLY = 2_000

_log = get_logger("confirmation")


class _Wait:
    """The wait for one placement, which its callers share."""

    def __init__(self, placement: Placement, *, rejected: bool | None) -> None:
        """``rejected`` is None where there was no notification yet."""
        self.placement = placement
        self.rejected = bool(rejected)
        self.notified = asyncio.Event()
        if rejected is not None:
            self.notified.set()

    async def next_look(self, seconds: float) -> None:
        """Returns after a notification, or after so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.notified.wait()
        self.notified.clear()


class ConfirmationWaiter:
    """Of one event loop. ``queue`` runs ``ConfirmBatch``."""

    def __init__(
        self, queue: GroupCommit[ConfirmRequest, Outcome], sync_timeout_seconds: float, max_callers: int
    ) -> None:
        self._queue = queue
        self._timeout_seconds = sync_timeout_seconds
        self._max_callers = max_callers
        self._callers = 0
        self._waits: dict[bytes, tuple[_Wait, asyncio.Task[Outcome]]] = {}
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
        if outcome is Outcome.WITHDRAWN:
            raise self._not_placed(wait)
        if outcome is Outcome.WAITING:
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
            if isinstance(result, Outcome):
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

    def _begin(self, placement: Placement) -> tuple[_Wait, asyncio.Task[Outcome]]:
        wait = _Wait(placement, rejected=self._early.pop(placement.token, None))
        begun = self._waits[placement.token] = wait, asyncio.create_task(self._outcome(wait), name="confirmation")
        return begun

    async def _outcome(self, wait: _Wait) -> Outcome:
        try:
            return Outcome.PLACED if await self._is_placed_in_time(wait) else await self._withdraw(wait)
        finally:
            del self._waits[wait.placement.token]

    async def _is_placed_in_time(self, wait: _Wait) -> bool:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_seconds
        while (left_seconds := deadline - loop.time()) > 0 and not wait.rejected:
            await wait.next_look(min(left_seconds, _POLL_SECONDS))
            if await self._is_placed(wait.placement, deadline):
                return True
        return False

    async def _is_placed(self, placement: Placement, deadline: float) -> bool:
        # A store that is away is not asked for longer than the caller waits; the withdrawal will meet it anyway.
        with contextlib.suppress(TimeoutError, SkipbusError):
            async with asyncio.timeout_at(deadline):
                return await self._queue.submit(ConfirmRequest(placement)) is Outcome.PLACED
        return False

    async def _withdraw(self, wait: _Wait) -> Outcome:
        placement = wait.placement
        try:
            outcome = await self._queue.submit(ConfirmRequest(placement, withdraw=True))
        except SkipbusError as error:
            _log.debug("placement in doubt", peer=placement.peer_id, reason=str(error))
            placement.in_doubt = True
            if len(self._outstanding) < _MAX_OUTSTANDING:
                self._outstanding[placement.token] = placement
            return Outcome.WAITING
        if outcome is Outcome.WITHDRAWN:
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
