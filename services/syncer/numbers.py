"""Numbers of envelopes: unique and growing, also after a restart and after the loss of the store.

A number is the time in microseconds, or one more than the last one where that is greater. So nothing has to be
kept for a new number to be new: a clock that was set back is made up for by the numbers still in the outbox.
"""

from __future__ import annotations

import threading
import time


class Numbers:
    """Hands out the numbers of one syncer, to any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self, known: int = 0) -> int:
        """A number greater than all handed out before and than ``known``."""
        with self._lock:
            self._last = max(time.time_ns() // 1000, self._last + 1, known + 1)
            return self._last
