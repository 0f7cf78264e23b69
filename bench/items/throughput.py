"""Item 1: what one api process answers at 64 connections, next to a bare handler and a bare loop of commits."""

from __future__ import annotations

from bench import wrk
from bench.bare_handler import bare_handler
from bench.bare_store import BareStore
from bench.cpu import CpuMeter
from bench.plan import Plan
from bench.report import Figure, Finding, Line, Target
from bench.stage import Stage

# Room for a run that is faster than the one that the number of keyIds is taken from.
_SPARE = 1.25


def measure(stage: Stage, plan: Plan) -> Finding:
    """The five take turns, so that a machine that grows slower grows slower for all of them."""
    store = BareStore(stage.mysql.dsn)
    bare: list[float] = []
    capabilities: list[float] = []
    issued: list[float] = []
    claimed: list[float] = []
    rows: list[float] = []
    meter = CpuMeter(api=stage.alice.processes["api"].pid, database=stage.mysql.pid)
    with bare_handler(stage.root, stage.alice) as bare_url:
        for _ in range(plan.rounds):
            bare.append(wrk.rate(bare_url, plan.step_seconds))
            capabilities.append(wrk.rate(f"{stage.alice.url}/capabilities", plan.step_seconds))
            stage.settle()
            with meter:
                issued.append(wrk.rate(stage.alice.key_url(stage.bob), plan.step_seconds))
            key_ids = stage.fill(stage.bob, stage.alice, keys_for(capabilities[-1], plan.step_seconds))
            stage.settle()
            claimed.append(claim_rate(stage, key_ids, plan.step_seconds))
            rows.append(store.batched_rows_per_second(plan.step_seconds / 2))
            stage.clear()
    store.close()
    yardstick = Figure("GET /capabilities", capabilities, "/s")
    floor = Figure("bare commits of 64 rows", rows, "keys/s")
    lines = [
        Line(1, yardstick, Figure("bare aiohttp handler, uvloop", bare, "/s"), Target("at least", 0.5)),
        Line(1, Figure("GET /key", issued, "/s"), yardstick, Target("at least", 0.5)),
        Line(1, Figure("GET /key/{keyId}", claimed, "/s"), yardstick, Target("at least", 0.35)),
        Line(1, Figure("GET /key", issued, "/s"), floor),
    ]
    return Finding(lines, [f"item 1: during GET /key, {meter.shown()}"])


def keys_for(per_second: float, seconds: int) -> int:
    """More keyIds than can be asked for in as many seconds, by the rate of what is quicker."""
    return int(per_second * seconds * _SPARE)


def claim_rate(stage: Stage, key_ids: list[str], seconds: int) -> float:
    """`GET /key/{keyId}` at KP_Alice, each keyId once: answers in a second."""
    return wrk.start_key_ids(stage.alice.url, stage.bob.system_id, key_ids, seconds).result().per_second
