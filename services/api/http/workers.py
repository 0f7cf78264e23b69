"""Several api processes for one KP on one host: ``SKIP_API_WORKERS`` > 1 makes this process their parent.

The parent only starts workers, starts one anew when it dies, and passes a stop on. Workers share the port
(SO_REUSEPORT) and nothing else, so the death of one ends only the requests that it held. A worker whose parent
dies, even by SIGKILL, is ended by the kernel.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

from skipbus.shared.lifecycle import DRAIN_SECONDS, EXIT_FAILED, EXIT_OK
from skipbus.shared.logging import get_logger
from skipbus.shared.settings import EXIT_BAD_CONFIGURATION, Settings

_PR_SET_PDEATHSIG = 1
_RESTART_SECONDS = (0.1, 0.5, 1.0, 2.0, 5.0)
_STABLE_SECONDS = 30.0
# Set by the parent for its workers; no setting.
_PARENT = "SKIPBUS_API_WORKERS_PARENT"

_log = get_logger("workers")


class _Worker:
    """One worker process and when it was started."""

    def __init__(self, index: int, metrics_port: int) -> None:
        self.index = index
        self.failures = 0
        self.restart_at = 0.0
        self._environment = {**os.environ, "SKIP_API_WORKERS": "1", _PARENT: str(os.getpid())}
        if metrics_port:
            self._environment["SKIP_METRICS_PORT"] = str(metrics_port + index)
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self.started = time.monotonic()
        return subprocess.Popen([sys.executable, "-m", "skipbus.services.api"], env=self._environment)

    def restart_if_dead(self) -> None:
        """Starts the worker anew when it has died; the more often it dies young, the later."""
        code = self.process.poll()
        now = time.monotonic()
        if code is None:
            return
        if not self.restart_at:
            self.failures = 0 if now - self.started > _STABLE_SECONDS else self.failures + 1
            delay = _RESTART_SECONDS[min(self.failures, len(_RESTART_SECONDS) - 1)]
            self.restart_at = now + delay
            _log.error("worker died", worker=self.index, exit_code=code, restart_seconds=delay)
        elif now >= self.restart_at:
            self.restart_at = 0.0
            self.process = self._start()


def end_with_parent() -> None:
    """In a worker: has the kernel end this process when its parent dies. Call it first."""
    if _PARENT not in os.environ:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(os.environ[_PARENT]):  # it has died already
        sys.exit(EXIT_FAILED)


def supervise(settings: Settings) -> int:
    """Runs ``settings.api_workers`` workers until SIGTERM or SIGINT; the exit code of the whole."""
    stop, hangup = threading.Event(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    signal.signal(signal.SIGHUP, lambda *_: hangup.set())
    workers = [_Worker(index, settings.metrics_port) for index in range(settings.api_workers)]
    _log.info("workers started", count=len(workers), pids=[worker.process.pid for worker in workers])
    refused = False
    while not stop.wait(0.1) and not refused:
        if hangup.is_set():
            hangup.clear()
            _pass_on(signal.SIGHUP, workers)
        for worker in workers:
            worker.restart_if_dead()
        refused = all(worker.process.poll() == EXIT_BAD_CONFIGURATION for worker in workers)
    _stop_all(workers)
    return EXIT_FAILED if refused else EXIT_OK


def _pass_on(number: signal.Signals, workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.send_signal(number)


def _stop_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.terminate()
    deadline = time.monotonic() + DRAIN_SECONDS + 2
    for worker in workers:
        try:
            worker.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
