"""Prometheus metrics of the api, in a registry of their own, served on ``SKIP_METRICS_PORT``."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

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
    ["queue"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    registry=REGISTRY,
)
_BATCH_SECONDS = Histogram(
    "skipbus_batch_seconds",
    "Duration of one commit.",
    ["queue"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5),
    registry=REGISTRY,
)
_BUS_ISSUED = Counter("skipbus_bus_keys_issued", "Keys answered over bus links.", ["peer", "way"], registry=REGISTRY)
_BUS_WITHDRAWN = Counter(
    "skipbus_bus_keys_withdrawn", "Keys taken back because the peer did not store them.", ["peer"], registry=REGISTRY
)
_BUS_STOCKED = Counter("skipbus_bus_keys_stocked", "Keys made for stock.", ["peer"], registry=REGISTRY)
_SYNC_REFUSED = Counter(
    "skipbus_sync_refused", "Envelopes refused at POST /sync.", ["reason", "sender"], registry=REGISTRY
)
_STOCK = Gauge("skipbus_stock", "Usable keys in stock.", ["peer", "state"], registry=REGISTRY)


def count_issued(peer_id: str, way: str) -> None:
    """One key was answered: out of ``stock``, or placed ``on_demand``."""
    _BUS_ISSUED.labels(peer_id, way).inc()


def count_withdrawn(peer_id: str, count: int) -> None:
    """Keys were taken back from a peer."""
    _BUS_WITHDRAWN.labels(peer_id).inc(count)


def count_sync_refused(reason: str, sender: str | None) -> None:
    """An envelope was not taken in at ``/sync``; a sender that is no peer has no name here."""
    _SYNC_REFUSED.labels(reason, sender or "unknown").inc()


def count_stocked(peer_id: str, count: int) -> None:
    """Keys were made for a peer's stock."""
    _BUS_STOCKED.labels(peer_id).inc(count)


def show_stock(peer_id: str, placed: int, in_flight: int) -> None:
    """A peer's stock was counted."""
    _STOCK.labels(peer_id, "placed").set(placed)
    _STOCK.labels(peer_id, "in_flight").set(in_flight)


def observe_request(route: str | None, status: int, seconds: float) -> None:
    """Counts one answered request; unknown paths share one label."""
    count, observe = _request_meters(route or "other", status)
    count()
    observe(seconds)


def batch_observer(queue: str) -> Callable[[int, float], None]:
    """Records each batch of a group commit queue: its size and its duration in seconds."""
    size, seconds = _BATCH.labels(queue), _BATCH_SECONDS.labels(queue)

    def observe(batch_size: int, batch_seconds: float) -> None:
        size.observe(batch_size)
        seconds.observe(batch_seconds)

    return observe


@lru_cache(maxsize=256)
def _request_meters(route: str, status: int) -> tuple[Callable[[], None], Callable[[float], None]]:
    return _REQUESTS.labels(route, str(status)).inc, _SECONDS.labels(route).observe
