"""Serves a process's Prometheus metrics on loopback, for the scraper and the probes of this host.

Adds what every process has: how many log lines it has dropped, and the ages of its regular tasks, by which a probe
tells a process that works from one that only exists. The event loop sets the ages, and a thread serves them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Gauge, Metric, start_http_server
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from skipbus.shared.errors import OperatorError
from skipbus.shared.logging import log_queue

_TASKS = CollectorRegistry()
_INTERVAL = Gauge("skipbus_task_interval_seconds", "How often a regular task is done.", ["task"], registry=_TASKS)
_TRIED = Gauge("skipbus_task_tried_age_seconds", "Time since it was last begun.", ["task"], registry=_TASKS)
_DONE = Gauge("skipbus_task_done_age_seconds", "Time since it last succeeded.", ["task"], registry=_TASKS)


class TaskAge:
    """When one regular task was last begun and last done, by the monotonic clock."""

    def __init__(self, name: str, interval_seconds: float) -> None:
        self._tried = self._done = -math.inf
        _INTERVAL.labels(name).set(interval_seconds)
        _TRIED.labels(name).set_function(lambda: time.monotonic() - self._tried)
        _DONE.labels(name).set_function(lambda: time.monotonic() - self._done)

    def tried(self) -> None:
        """It is begun."""
        self._tried = time.monotonic()

    def done(self) -> None:
        """It has succeeded."""
        self._done = time.monotonic()


def serve_metrics(port: int, registry: CollectorRegistry) -> None:
    """Serves ``registry`` on 127.0.0.1:``port`` from a thread; port 0 means not at all. Raises OperatorError."""
    if port == 0:
        return
    registry.register(_LogLines())
    registry.register(_TASKS)
    try:
        start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise OperatorError(f"cannot serve metrics on port {port}: {error.strerror} (SKIP_METRICS_PORT)") from error


class _LogLines(Collector):
    """The queue counts; the number is read when the metrics are asked for."""

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "skipbus_log_lines_dropped",
            "Log lines given up because the reader of standard output stopped or went away.",
            value=log_queue.dropped_lines,
        )
