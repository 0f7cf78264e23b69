"""Prometheus metrics of the syncer, in a registry of their own, served on ``SKIP_METRICS_PORT``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

REGISTRY = CollectorRegistry()
SENT = Counter(
    "skipbus_envelopes_sent",
    "Envelopes sent, by what became of them.",
    ["type", "outcome"],
    registry=REGISTRY,
)
RECEIVED = Counter(
    "skipbus_envelopes_received", "Envelopes handled, by what came of them.", ["type", "outcome"], registry=REGISTRY
)
REFUSED = Counter(
    "skipbus_envelopes_refused",
    "Envelopes refused and dead-lettered. Senders that are no peers share the label 'unknown'.",
    ["reason", "sender"],
    registry=REGISTRY,
)
REFUSED_BY_PEER = Counter(
    "skipbus_envelopes_refused_by_peer",
    "Envelopes of this key provider that a peer refused, by what it said.",
    ["reason", "peer"],
    registry=REGISTRY,
)
OUTBOX = Gauge("skipbus_outbox_envelopes", "Envelopes that wait for their acknowledgement.", registry=REGISTRY)
ELECTED = Gauge("skipbus_syncer_elected", "1 where this syncer relays and sends heartbeats.", registry=REGISTRY)
BUS_UP = Gauge("skipbus_bus_up", "1 while the broker is connected and confirms messages.", registry=REGISTRY)
QUEUE_WITHOUT_LEADER = Gauge(
    "skipbus_queue_without_leader",
    "1 while this key provider's quorum queue has no leader, which an operator must look into.",
    registry=REGISTRY,
)
PEERS = Gauge("skipbus_peers", "Peers by what their heartbeats say.", ["status"], registry=REGISTRY)
