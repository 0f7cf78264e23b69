"""Item 10: how many keys a second are placed at the peer, through both brokers, while an empty stock is filled.

Counted in the databases, not by what a key provider says of itself: a key counts once its record is committed at the
peer's and its acknowledgement at the source's. The time begins when the first key is made, not when it arrives: a
backlog that was made before would be placed faster than keys can be made.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from bench.cpu import CpuMeter
from bench.plan import Plan
from bench.progress import tell
from bench.report import Figure, Finding, Line, Target
from bench.sites_stage import SitesStage
from bench.stage import Stage
from sandbox.processes import SandboxError

_POLL_SECONDS = 0.1
_GIVE_UP_SECONDS = 150.0


def measure(stage: Stage, plan: Plan) -> Finding:
    """Each round begins with empty stores and new processes."""
    sites = stage.sites()
    rates: list[float] = []
    shares: list[str] = []
    for _ in range(max(2, plan.rounds // 2)):
        sites.set_up(plan.large_stock, fill=False)
        rate, shown = _fill(sites, plan.large_stock)
        rates.append(rate)
        shares.append(shown)
        tell(f"  {rate:,.0f} keys/s")
    line = Line(
        10,
        Figure("keys placed at the peer through both brokers", rates, "keys/s"),
        target=Target("at least", 2000, "keys/s", Figure("", rates, "").median),
    )
    return Finding([line], [f"item 10: while stock is filled, {shown}" for shown in shares])


def _fill(sites: SitesStage, stock: int) -> tuple[float, str]:
    """(keys in a second until the stock is full, who was busy). Raises SandboxError."""
    deadline = time.monotonic() + _GIVE_UP_SECONDS
    _wait(sites.count_stock, 1, deadline)
    started = time.monotonic()
    waiting: list[int] = []

    def count() -> int:
        placed = sites.count_placed()
        waiting.append(sites.count_stock() - placed)
        return placed

    with CpuMeter(**sites.processes()) as meter:
        placed = _wait(count, stock, deadline)
    seconds = time.monotonic() - started
    if (there := sites.count_at_bob()) < placed:
        raise SandboxError(f"{placed} keys are said to be placed, but only {there} are at the peer")
    # Many that wait: placing is the limit. Few: making them is.
    backlog = f"{statistics.mean(waiting):,.0f} keys were made and not yet placed on average, {max(waiting):,} at most"
    return placed / seconds, f"{meter.shown()}; {backlog}"


def _wait(count: Callable[[], int], wanted: int, deadline: float) -> int:
    while (there := count()) < wanted:
        if time.monotonic() > deadline:
            raise SandboxError(f"only {there} of {wanted} keys in {_GIVE_UP_SECONDS:.0f} s")
        time.sleep(_POLL_SECONDS)
    return there
