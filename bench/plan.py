"""How long and how large a run is: the full one, whose figures count, and the quick one, which tries the bench out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Sizes of a run. `rounds` is how often compared measurements take turns."""

    step_seconds: int
    rounds: int
    few_live_keys: int
    many_live_keys: int
    expired_keys: int
    inserts: int
    memory_requests: int
    handshakes: int
    placings: int
    large_stock: int
    cut_seconds: int
    idle_seconds: int


FULL = Plan(
    step_seconds=5,
    rounds=5,
    few_live_keys=1_000,
    many_live_keys=1_000_000,
    expired_keys=1_000_000,
    inserts=2_000,
    memory_requests=1_000_000,
    handshakes=100_000,
    placings=500,
    large_stock=100_000,
    cut_seconds=60,
    idle_seconds=30,
)
QUICK = Plan(
    step_seconds=1,
    rounds=3,
    few_live_keys=1_000,
    many_live_keys=50_000,
    expired_keys=200_000,
    inserts=300,
    memory_requests=40_000,
    handshakes=10_000,
    placings=100,
    large_stock=20_000,
    cut_seconds=10,
    idle_seconds=10,
)
