"""Keeps the process awake for the moment in which the store works for one caller alone.

A process that sleeps until the store's answer comes is woken late, and goes on with cold caches: on a virtual machine
that was a tenth of what one encryptor alone waits for. So the event loop goes round instead of sleeping, at most for
as long as a commit takes on a good disk. Nobody else is kept waiting, since each round looks for what has come. Where
the store took longer than that the last time, there is nothing to gain, and the process sleeps. Leaves to others: when
one caller is alone, and whether there is a processor to spare (``lanes``).
"""

from __future__ import annotations

import asyncio
import time

# A commit on a disk that keeps its promises takes 0.1 to 0.8 ms, and what a round costs is paid for by one caller.
MAX_SECONDS = 0.001


class Awake:
    """Of one lane."""

    __slots__ = ("_loop", "_round", "_since", "_worth_it")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._round: asyncio.Handle | None = None
        self._since: float | None = None
        self._worth_it = True

    def begin(self) -> None:
        """Statements are on their way, for one caller."""
        if self._since is None:
            self._since = time.monotonic()
            if self._worth_it and self._round is None:
                self._round = self._loop.call_soon(self._go_round)

    def end(self) -> None:
        """They have been answered, or nobody waits for them any more."""
        if self._since is not None:
            self._worth_it = time.monotonic() - self._since <= MAX_SECONDS
            self._since = None

    def _go_round(self) -> None:
        waiting = self._since is not None and time.monotonic() - self._since < MAX_SECONDS
        self._round = self._loop.call_soon(self._go_round) if waiting else None
