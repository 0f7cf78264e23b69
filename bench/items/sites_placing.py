"""Item 10: how many keys a second are placed at the peer, through both brokers, while a stock is filled."""

from __future__ import annotations

import time

from bench import wrk
from bench.cpu import CpuMeter
from bench.plan import Plan
from bench.report import Figure, Finding, Line, Target
from bench.sites_stage import SitesStage
from bench.stage import Stage
from bench.waiting import key_url, tell
from sandbox.processes import SandboxError

_POLL_SECONDS = 0.2
_GIVE_UP_SECONDS = 150.0
_DRAIN_SECONDS = 2


def measure(stage: Stage, plan: Plan) -> Finding:
    """From the moment at which nobody takes any more until it is full, by KP_Alice's own count of what is placed."""
    sites = stage.sites()
    sites.set_up(plan.large_stock)
    rates: list[float] = []
    meter = CpuMeter(**sites.processes())
    for _ in range(plan.rounds):
        _drain(sites, plan)
        with meter:
            rates.append(_fill(sites, plan))
        tell(f"  {rates[-1]:,.0f} keys/s")
    line = Line(
        10,
        Figure("keys placed at the peer through both brokers", rates, "keys/s"),
        target=Target("at least", 2000, "keys/s", Figure("", rates, "").median),
    )
    return Finding([line], [f"item 10: while stock is filled, {meter.shown()}"])


def _drain(sites: SitesStage, plan: Plan) -> None:
    """Take what is in stock until little is left; refilling goes on meanwhile."""
    deadline = time.monotonic() + _GIVE_UP_SECONDS
    while sites.stock().placed > plan.large_stock // 4:
        if time.monotonic() > deadline:
            raise SandboxError("the stock is filled faster than it can be taken")
        wrk.start(key_url(sites.alice, sites.bob), _DRAIN_SECONDS).result()


def _fill(sites: SitesStage, plan: Plan) -> float:
    """Keys in a second until the stock is full. Raises SandboxError."""
    # What was under way when the last one was taken is not counted.
    before = sites.stock().placed
    started = time.monotonic()
    while (placed := sites.stock().placed) < plan.large_stock:
        if time.monotonic() - started > _GIVE_UP_SECONDS:
            raise SandboxError(f"{placed} of {plan.large_stock} keys were placed in {_GIVE_UP_SECONDS:.0f} s")
        time.sleep(_POLL_SECONDS)
    return (placed - before) / (time.monotonic() - started)
