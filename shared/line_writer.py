"""Owns the way of log lines to stdout: whole lines, in their order, never in the way of a request.

Rules: nothing here raises or blocks for a reader that has stopped reading. What cannot be written waits
in a bounded backlog; beyond it lines are dropped and counted. Any thread may write.
Leaves to others: what stands in a line (`skipbus.shared.log_rendering`), and telling about dropped lines.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

_RETRY_SECONDS = 0.05
_STOPPED_READER = (BlockingIOError, InterruptedError)


class LineWriter:
    """Writes lines to a file descriptor, those of one event-loop iteration together with one call.

    `dropped_lines` counts the lines that were given up because the reader stopped or went away.
    """

    def __init__(self, descriptor: int = 1, *, max_backlog_octets: int = 1 << 20) -> None:
        self.dropped_lines = 0
        self._sink = _open_sink(descriptor)
        self._max_backlog_octets = max_backlog_octets
        self._pending: deque[bytes] = deque()
        # What the reader has not taken yet. It may begin within a line, whose first part is written already.
        self._backlog = b""
        self._lock = threading.Lock()
        self._scheduled_on: asyncio.AbstractEventLoop | None = None

    def write(self, line: bytes) -> None:
        """Take one whole line, with or without its line end, to be written in this event-loop iteration.

        Outside of an event loop it is written at once.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.write_now(line)
        else:
            self.write_soon(line, loop)

    def write_soon(self, line: bytes, loop: asyncio.AbstractEventLoop) -> None:
        """As ``write``, for one who is called in ``loop``: asking which loop runs is a system call on Python 3.11."""
        self._pending.append(line)
        if self._scheduled_on is not loop:
            self._scheduled_on = loop
            loop.call_soon(self._flush_scheduled)

    def write_now(self, line: bytes) -> None:
        """Write one line at once, after those that were taken before it."""
        self._pending.append(line)
        self.flush()

    def flush(self) -> None:
        """Write everything that the reader takes now."""
        # A thread that finds the lock taken may leave: the holder looks for new lines again after letting go.
        # So no thread waits for another one, nor for itself where a log line is written within a flush.
        while self._lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._lock.release()
            if not self._pending:
                return

    def close(self, wait_seconds: float = 0.5) -> None:
        """Flush, wait up to `wait_seconds` for a slow reader, and drop and count every later line.

        The descriptor that the writer was made with stays open.
        """
        deadline = time.monotonic() + wait_seconds
        self.flush()
        while self._backlog and (left := deadline - time.monotonic()) > 0:
            _wait_until_writable(self._sink.descriptor, min(left, _RETRY_SECONDS))
            self.flush()
        sink, self._sink = self._sink, _CLOSED
        sink.release()

    def forget(self) -> None:
        """Give up what is not written yet, in a forked child: its parent writes it, and may hold the lock."""
        self._pending.clear()
        self._backlog = b""
        self._lock = threading.Lock()
        self._scheduled_on = None

    def _flush_scheduled(self) -> None:
        # The mark goes first: a line that comes during the flush is taken by it or schedules the next one.
        loop, self._scheduled_on = self._scheduled_on, None
        self.flush()
        if self._backlog and loop is not None and not loop.is_closed():
            self._scheduled_on = loop
            loop.call_later(_RETRY_SECONDS, self._flush_scheduled)

    def _drain(self) -> None:
        lines = [self._pending.popleft() for _ in range(len(self._pending))]
        ended = [line if line.endswith(b"\n") else line + b"\n" for line in lines]
        octets = self._backlog + b"".join(ended)
        self._backlog = b""
        if octets:
            self._keep(octets[self._put_quietly(octets) :])

    def _put_quietly(self, octets: bytes) -> int:
        try:
            return self._sink.put(octets)
        except _STOPPED_READER:
            return 0
        except OSError:
            # The reader is gone, or the disk is full: nothing of this will ever be read.
            self.dropped_lines += octets.count(b"\n")
            return len(octets)

    def _keep(self, left: bytes) -> None:
        """Keep as many whole lines as the backlog holds, the oldest first, and drop the others."""
        cut = len(left)
        if cut > self._max_backlog_octets:
            # At least the first line stays: its beginning may be written, and the rest must follow.
            cut = max(left.rfind(b"\n", 0, self._max_backlog_octets), left.find(b"\n")) + 1
            self.dropped_lines += left.count(b"\n", cut)
        self._backlog = left[:cut]


@dataclass(frozen=True)
class _Sink:
    """Where octets go: a descriptor to wait on, a write that does not block, a way to let go."""

    descriptor: int
    put: Callable[[bytes], int]
    release: Callable[[], None]


def _refuse(_octets: bytes) -> int:
    raise OSError(errno.EBADF, "the writer is closed")


_CLOSED = _Sink(-1, _refuse, lambda: None)


def _open_sink(descriptor: int) -> _Sink:
    plain = _Sink(descriptor, partial(os.write, descriptor), lambda: None)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISSOCK(mode):
            return _open_socket(descriptor)
        return _reopen(descriptor) if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) else plain
    except OSError:
        # It is closed, or this user may not open it anew. Then its own writes serve, though they may block.
        return plain


def _open_socket(descriptor: int) -> _Sink:
    sender = socket.socket(fileno=os.dup(descriptor))
    return _Sink(sender.fileno(), lambda octets: sender.send(octets, socket.MSG_DONTWAIT), sender.close)


def _reopen(descriptor: int) -> _Sink:
    # O_NONBLOCK on the descriptor itself would hit every process that shares it, such as the shell. Opened
    # anew, the pipe or the terminal has a flag of its own.
    flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    own = os.open(f"/proc/self/fd/{descriptor}", flags)
    return _Sink(own, partial(os.write, own), partial(os.close, own))


def _wait_until_writable(descriptor: int, seconds: float) -> None:
    poller = select.poll()
    poller.register(descriptor, select.POLLOUT)
    poller.poll(seconds * 1000)
