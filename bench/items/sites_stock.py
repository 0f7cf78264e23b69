"""Item 9: what one api process answers from stock at 64 connections, next to `GET /key` over a store link."""

from __future__ import annotations

from bench import wrk
from bench.cpu import CpuMeter
from bench.plan import Plan
from bench.progress import tell
from bench.report import Figure, Finding, Line, Target
from bench.sites_stage import SitesStage
from bench.stage import Stage
from sandbox.processes import SandboxError


def measure(stage: Stage, plan: Plan) -> Finding:
    """The two take turns. Between two turns the stock is filled up again: it lasts for the whole of each."""
    sites = stage.sites()
    sites.set_up(plan.large_stock)
    from_stock: list[float] = []
    over_store: list[float] = []
    meter = CpuMeter(api=sites.alice.processes["api"].pid, database=sites.sites.sites[0].mysql.pid)
    for _ in range(plan.rounds):
        over_store.append(wrk.rate(stage.alice.key_url(stage.bob), plan.step_seconds))
        stage.settle()
        sites.settle()
        with meter:
            from_stock.append(_turn(sites, plan))
        tell(f"  stock is filled up again: {sites.wait_full():.1f} s")
    stage.clear()
    line = Line(
        9,
        Figure("GET /key from stock, 64 connections", from_stock, "/s"),
        Figure("GET /key over a store link", over_store, "/s"),
        Target("at least", 0.7),
    )
    return Finding([line], [f"item 9: during GET /key from stock, {meter.shown()}"])


def _turn(sites: SitesStage, plan: Plan) -> float:
    """Raises SandboxError when a key did not come from stock: it would have been placed on demand."""
    before = sites.issued("on_demand")
    rate = wrk.rate(sites.alice.key_url(sites.bob), plan.step_seconds)
    if placed := sites.issued("on_demand") - before:
        raise SandboxError(f"{placed:.0f} keys did not come from stock")
    return rate
