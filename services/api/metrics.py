"""Prometheus metrics of the api, in a registry of their own, served on ``SKIP_METRICS_PORT``."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from prometheus_client import CollectorRegistry, Counter, Histogram

REGISTRY = CollectorRegistry()
_REQUESTS = Counter("skipbus_requests", "Requests answered.", ["route", "status"], registry=REGISTRY)
_SECONDS = Histogram(
    "skipbus_request_seconds",
    "Time from a request's last header byte to its answer.",
    ["route"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
    registry=REGISTRY,
)
_BATCH = Histogram(
    "skipbus_batch_size",
    "Requests in one commit.",
    ["lane"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    registry=REGISTRY,
)
_BATCH_SECONDS = Histogram(
    "skipbus_batch_seconds",
    "Duration of one commit.",
    ["lane"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5),
    registry=REGISTRY,
)


def observe_request(route: str | None, status: int, seconds: float) -> None:
    """Counts one answered request; unknown paths share one label."""
    count, observe = _request_meters(route or "other", status)
    count()
    observe(seconds)


def batch_observer(lane: str) -> Callable[[int, float], None]:
    """What a lane tells of each batch: its size and its duration in seconds."""
    size, seconds = _BATCH.labels(lane), _BATCH_SECONDS.labels(lane)

    def observe(batch_size: int, batch_seconds: float) -> None:
        size.observe(batch_size)
        seconds.observe(batch_seconds)

    return observe


@lru_cache(maxsize=256)
def _request_meters(route: str, status: int) -> tuple[Callable[[], None], Callable[[float], None]]:
    return _REQUESTS.labels(route, str(status)).inc, _SECONDS.labels(route).observe
