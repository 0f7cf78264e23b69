"""Log lines on their way to standard output: a bounded queue, and one thread that writes it.

Rules: taking a line never blocks and never raises, from any thread and from signal handlers. While the reader of
standard output has stopped, lines wait in the queue; when it is full, lines are dropped and counted. What is in the
queue when the process ends is written, if the reader takes it within half a second. SIGKILL loses it.
"""

from __future__ import annotations

import os
import queue
import select
import threading
import time

MAX_LINES = 10_000
_MAX_LINES_PER_WRITE = 256
_GATHER_SECONDS = 0.002
_END = b""


class LogQueue:
    """Takes lines for a file descriptor. ``dropped_lines`` counts those that were given up."""

    def __init__(self, descriptor: int = 1, max_lines: int = MAX_LINES) -> None:
        self.dropped_lines = 0
        self._descriptor = descriptor
        self._max_lines = max_lines
        # Without a bound of its own, because the lock of queue.Queue is not safe in a signal handler.
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        # A daemon: a reader that has stopped must not keep the process from ending.
        self._writer = threading.Thread(target=self._write_lines, name="log", daemon=True)

    def start(self) -> None:
        """Starts the thread, once. Lines that were taken before wait in the queue."""
        if not self._writer.is_alive():
            self._writer.start()

    def put(self, line: bytes) -> None:
        """Takes one line, without its line end."""
        if self._lines.qsize() < self._max_lines:
            self._lines.put(line + b"\n")
        else:
            self.dropped_lines += 1

    def close(self, wait_seconds: float = 0.5) -> None:
        """Waits until everything is written, at most ``wait_seconds``. Later lines are dropped and counted."""
        self._max_lines = 0
        self._lines.put(_END)
        if self._writer.is_alive():
            self._writer.join(wait_seconds)

    def _write_lines(self) -> None:
        lines: list[bytes] = []
        while _END not in lines:
            lines = self._next_lines()
            self._write(b"".join(lines))

    def _next_lines(self) -> list[bytes]:
        """What waits now, to be written with one system call; at least one line."""
        lines = [self._lines.get()]
        # Lines that follow soon go out with it: waking this thread for each would cost more than the line itself.
        time.sleep(_GATHER_SECONDS)
        while len(lines) < _MAX_LINES_PER_WRITE and not self._lines.empty():
            lines.append(self._lines.get())
        return lines

    def _write(self, octets: bytes) -> None:
        while octets:
            try:
                octets = octets[os.write(self._descriptor, octets) :]
            except BlockingIOError:
                # Another process has made the pipe non-blocking for all that share it.
                select.select([], [self._descriptor], [])
            except OSError:
                # The reader is gone, or the disk is full.
                self.dropped_lines += octets.count(b"\n")
                return
