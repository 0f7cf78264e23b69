"""Serves a process's Prometheus metrics on loopback, where nobody but the host's own scraper asks.

Adds what every process has: how many log lines it had to give up, which its log cannot tell while nobody reads it.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from shared.errors import OperatorError
from shared.logs import line_writer


def serve_metrics(port: int, registry: CollectorRegistry) -> None:
    """Serves ``registry`` on 127.0.0.1:``port`` from a thread; port 0 means not at all. Raises OperatorError."""
    if port == 0:
        return
    registry.register(_LogLines())
    try:
        start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise OperatorError(f"cannot serve metrics on port {port}: {error.strerror} (SKIP_METRICS_PORT)") from error


class _LogLines(Collector):
    """Read when it is asked for: the writer counts without a lock or a library in its way."""

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "skipbus_log_lines_dropped",
            "Log lines given up because the reader of standard output stopped or went away.",
            value=line_writer().dropped_lines,
        )
