"""Which of several processes does a thing that one alone should do: the holder of a lease.

Rules: a holder renews its lease every 2 s and relies on it for 5 s after the last renewal that succeeded. Another
process takes the lease over when it has seen it unchanged for 6 s, or immediately where the holder has given it back
or was a process of this host that has ended. A holder that was stopped or cut off finds out by its own clock that its
time is over. Clocks of two hosts are never compared. What is done under a lease must be safe to do twice: a process
may be stopped between the question whether it is elected and what it does then.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from sqlalchemy import Engine

from skipbus.shared.errors import BackendError, StoreConflict
from skipbus.shared.store.engine import driver_errors
from skipbus.shared.store.leases import (
    Lease,
    fetch_lease,
    give_back_lease,
    insert_lease,
    renew_lease,
    take_over_lease,
)

RENEW_SECONDS = 2.0
VALID_SECONDS = 5.0
# Longer than a lease is valid for its holder, so that there are not two of them even if a commit takes a second.
SILENCE_SECONDS = 6.0


class Election:
    """One candidate, for any thread; ``tick`` and ``release`` block."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        silence_seconds: float = SILENCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``name`` is at most 128 characters; ``clock`` is monotonic, in seconds.

        A holder that has not renewed its lease for ``silence_seconds`` loses it to this candidate.
        """
        self._engine = engine
        self._name = name
        self._silence_seconds = silence_seconds
        self._clock = clock
        self._holder = _this_process()
        self._valid_until = self._renew_at = self._seen_at = clock()
        self._seen: Lease | None = None
        self._lock = Lock()
        self._released = False

    @property
    def elected(self) -> bool:
        """Whether this candidate holds the lease now, by its own clock and without asking the store."""
        return self._clock() < self._valid_until

    def tick(self) -> bool:
        """To be called every second: renews the lease or tries to get it. Whether this candidate is elected.

        Raises StoreUnavailable or StoreRefused; an elected candidate stays so until its lease is over.
        """
        with self._lock:
            return not self._released and self._tick()

    def _tick(self) -> bool:
        # Before the statement: the lease counts from when it was asked for.
        now = self._clock()
        if not self.elected or now >= self._renew_at:
            try:
                has_it = self._ask(now)
            except StoreConflict:  # another candidate was faster; the next tick sees what became of it
                return self.elected
            self._valid_until = now + VALID_SECONDS if has_it else now
            self._renew_at = now + RENEW_SECONDS
        return self.elected

    def release(self) -> None:
        """Gives the lease back for good, so that another candidate need not wait.

        A process that ends may still be in a ``tick`` in another thread: that must not take the lease again.
        """
        with self._lock:
            self._released = True
            if not self.elected:
                return
            self._valid_until = self._clock()
            with contextlib.suppress(BackendError), driver_errors(), self._engine.begin() as connection:
                give_back_lease(connection, self._name, self._holder)

    def _ask(self, now: float) -> bool:
        """One transaction. Only what it has committed counts."""
        with driver_errors(), self._engine.begin() as connection:
            if renew_lease(connection, self._name, self._holder):
                return True
            found = fetch_lease(connection, self._name)
            if found is None:
                found = insert_lease(connection, self._name)
            if found != self._seen:
                self._seen, self._seen_at = found, now
            is_free = not found.holder or now - self._seen_at >= self._silence_seconds or _has_ended(found.holder)
            return is_free and take_over_lease(connection, self._name, self._holder, found)


def _this_process() -> str:
    """Names this process, and says enough of it to find out on the same host whether it lives."""
    return f"{_host()} {os.getpid()} {secrets.token_hex(8)}"


def _host() -> str:
    """The running kernel and the namespace of process ids: a pid means the same to all who have both in common."""
    try:
        return (
            Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            + " "
            + str(Path("/proc/self/ns/pid").readlink())
        )
    except OSError:
        # Not Linux, or a hardened container: nothing is known of other processes, so leases run out by time alone.
        return f"{secrets.token_hex(16)} -"


def _has_ended(holder: str) -> bool:
    """Whether the holder was a process of this host that is there no more."""
    try:
        host, pid, _ = holder.rsplit(" ", 2)
        if host == _host():
            os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        # It lives and belongs to another user; or another account of the store has written what no process is called.
        return False
    return False
