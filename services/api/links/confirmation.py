"""Waits for placements to be settled, many callers on one: no thread and no connection is held for any of them.

A notification says that it is worth looking; without one each placement is looked up once a second. At the timeout,
or when the peer has refused the envelope, the placement is taken back. Where the store cannot be asked then, its
caller is told so, and the keys are owed: they are withdrawn once the store is back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence

from skipbus.services.api import metrics
from skipbus.services.api.batching import Lane
from skipbus.services.api.links.placing import Check, Outcome, Placement, Release, Settlement, Withdraw
from skipbus.shared.errors import NotPlaced, Overloaded, SkipbusError, StoreUnavailable
from skipbus.shared.logs import get_logger

_POLL_SECONDS = 1.0
# Kept for when the store is back. Beyond this the syncer's own withdrawal has to do.
_MAX_OWED = 10_000
_MAX_RELEASED = 100_000
_AT_ONCE = 500
_MAX_EARLY = 2_000

_log = get_logger("settling")


class _Wait:
    """One placement, and everybody who waits for it."""

    __slots__ = ("placement", "task", "woken")

    def __init__(self, placement: Placement, settle: Callable[[_Wait], Coroutine[None, None, Outcome]]) -> None:
        self.placement = placement
        self.woken = asyncio.Event()
        self.task = asyncio.get_running_loop().create_task(settle(self))

    def hear(self, *, refused: bool) -> None:
        """It may be settled, or is said to be refused."""
        self.placement.refused |= refused
        self.woken.set()


class Settler:
    """Of one event loop. ``lane`` runs ``SettleBatch``."""

    def __init__(self, lane: Lane[Settlement, Outcome], sync_timeout_seconds: float, max_callers: int) -> None:
        self._lane = lane
        self._timeout_seconds = sync_timeout_seconds
        self._max_callers = max_callers
        self._callers = 0
        self._waits: dict[bytes, _Wait] = {}
        self._early: dict[bytes, bool] = {}
        self._owed: dict[bytes, Placement] = {}
        self._released: dict[str, list[bytes]] = {}
        self._given_up: Counter[tuple[str, str]] = Counter()
        self._loop = asyncio.get_running_loop()

    def __len__(self) -> int:
        """How many callers wait."""
        return self._callers

    def check_room(self) -> None:
        """Raises Overloaded where as many callers wait as may: a peer that is away must not gather all of them."""
        if self._callers >= self._max_callers:
            raise Overloaded("too many requests wait for the other key provider; try again")

    async def settle(self, placement: Placement) -> None:
        """Returns once the peer has the keys. Raises NotPlaced once they are withdrawn, StoreUnavailable otherwise."""
        self._callers += 1
        try:
            outcome = await self._outcome(placement)
        finally:
            self._callers -= 1
        if outcome is Outcome.WITHDRAWN:
            raise self._not_placed(placement)
        if outcome is Outcome.WAITING:
            raise StoreUnavailable("the key store did not say whether the other key provider has the key")

    def stored(self, tokens: Sequence[bytes]) -> None:
        """Somebody says that these rows are acknowledged: look."""
        self._heard_of(tokens, refused=False)

    def refused(self, tokens: Sequence[bytes]) -> None:
        """Somebody says that the peer has refused these rows: take them back, unless they are placed."""
        self._heard_of(tokens, refused=True)

    def release(self, source_id: str, key_id: bytes) -> None:
        """A key of a bus source was handed out here; it is taken off that source's waiting stock soon."""
        waiting = self._released.setdefault(source_id, [])
        if len(waiting) < _MAX_RELEASED:
            waiting.append(key_id)

    async def tidy(self) -> None:
        """What need not be done at once: releases, and withdrawals that are owed. Raises SkipbusError."""
        self._tell_given_up()
        for source_id, key_ids in list(self._released.items()):
            while key_ids:
                some = tuple(key_ids[:_AT_ONCE])
                await self._lane.submit(Release(source_id, some))
                del key_ids[: len(some)]
        while self._owed:
            placements = list(self._owed.values())[:_AT_ONCE]
            await asyncio.gather(*(self._lane.submit(Withdraw(one, certainly=True)) for one in placements))
            for one in placements:
                del self._owed[one.token]
                self._note_given_up(one, "the store was away")

    def _heard_of(self, tokens: Sequence[bytes], *, refused: bool) -> None:
        for token in tokens:
            wait = self._waits.get(token)
            if wait is not None:
                wait.hear(refused=refused)
                continue
            # Another process's, or one whose commit this process has yet to hear of.
            self._early[token] = refused
            if len(self._early) > _MAX_EARLY:
                del self._early[next(iter(self._early))]

    async def _outcome(self, placement: Placement) -> Outcome:
        # What is settled must never be looked up again: a row that was withdrawn is as gone as one that was placed.
        if placement.outcome is not None:
            return placement.outcome
        wait = self._waits.get(placement.token)
        if wait is None:
            wait = self._waits[placement.token] = _Wait(placement, self._settle)
            if (refused := self._early.pop(placement.token, None)) is not None:
                wait.hear(refused=refused)
        # One caller who goes away must not end the wait of the others.
        return await asyncio.shield(wait.task)

    async def _settle(self, wait: _Wait) -> Outcome:
        placement = wait.placement
        try:
            placed = await self._is_placed_in_time(wait)
            placement.outcome = Outcome.PLACED if placed else await self._give_up(placement)
            return placement.outcome
        finally:
            del self._waits[placement.token]

    async def _is_placed_in_time(self, wait: _Wait) -> bool:
        deadline = self._loop.time() + self._timeout_seconds
        while (left_seconds := deadline - self._loop.time()) > 0 and not wait.placement.refused:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_seconds, _POLL_SECONDS)):
                    await wait.woken.wait()
            wait.woken.clear()
            if await self._is_placed(wait, deadline):
                return True
        return False

    async def _is_placed(self, wait: _Wait, deadline: float) -> bool:
        # A store that is away is not asked for longer than the caller waits; giving up will meet it anyway.
        with contextlib.suppress(TimeoutError, SkipbusError):
            async with asyncio.timeout_at(deadline):
                return await self._lane.submit(Check(wait.placement)) is Outcome.PLACED
        return False

    async def _give_up(self, placement: Placement) -> Outcome:
        try:
            outcome = await self._lane.submit(Withdraw(placement))
        except SkipbusError as error:
            _log.debug("placement not settled", peer=placement.peer_id, reason=str(error))
            if len(self._owed) < _MAX_OWED:
                self._owed[placement.token] = placement
            return Outcome.WAITING
        if outcome is Outcome.WITHDRAWN:
            self._note_given_up(placement, "refused" if placement.refused else "not stored in time")
        return outcome

    def _not_placed(self, placement: Placement) -> NotPlaced:
        peer_id = placement.peer_id
        if placement.refused:
            return NotPlaced(f"key provider {peer_id} refused the key; it is withdrawn (see /status/sync for why)")
        return NotPlaced(
            f"key provider {peer_id} has not stored the key within {self._timeout_seconds:g} s; it is withdrawn"
        )

    def _note_given_up(self, placement: Placement, reason: str) -> None:
        self._given_up[placement.peer_id, reason] += len(placement.keys)
        metrics.count_withdrawn(placement.peer_id, len(placement.keys))

    def close(self) -> None:
        """Lets go of what still waits: the syncer withdraws it."""
        for wait in self._waits.values():
            wait.task.cancel()

    def _tell_given_up(self) -> None:
        # Each refused request has its own line in the access log; this one is for whoever watches the peers.
        given_up, self._given_up = self._given_up, Counter()
        for (peer_id, reason), count in given_up.items():
            _log.warning("keys withdrawn", peer=peer_id, count=count, reason=reason)
