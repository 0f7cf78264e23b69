"""Serves a process's Prometheus metrics on loopback, where nobody but the host's own scraper asks."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, start_http_server

from shared.errors import OperatorError


def serve_metrics(port: int, registry: CollectorRegistry) -> None:
    """Serves ``registry`` on 127.0.0.1:``port`` from a thread; port 0 means not at all. Raises OperatorError."""
    if port == 0:
        return
    try:
        start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise OperatorError(f"cannot serve metrics on port {port}: {error.strerror} (SKIP_METRICS_PORT)") from error
