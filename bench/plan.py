"""How long and how large a run is: the full one, whose figures count, and the quick one, which tries the bench out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Sizes of a run. `rounds` is how often compared measurements take turns.

    A machine shared with others changes its speed from second to second, by half and more. Where that would hide what
    is looked for, measurements take `turns` short turns of `turn_seconds` in each round instead of one long step.
    """

    step_seconds: int
    rounds: int
    turn_seconds: int
    turns: int
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
    turn_seconds=1,
    turns=8,
    few_live_keys=1_000,
    many_live_keys=1_000_000,
    expired_keys=1_000_000,
    inserts=500,
    memory_requests=1_000_000,
    handshakes=100_000,
    placings=125,
    large_stock=100_000,
    cut_seconds=60,
    idle_seconds=30,
)
QUICK = Plan(
    step_seconds=1,
    rounds=3,
    turn_seconds=1,
    turns=1,
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
