"""Item 3: how long one caller alone waits for a key."""

from __future__ import annotations

from bench import wrk
from bench.bare_servers import bare_key_handler
from bench.bare_store import BareStore
from bench.plan import Plan
from bench.report import Figure, Finding, Line, Target
from bench.stage import Stage
from bench.waiting import key_url

_UNIT = "µs"


def measure(stage: Stage, plan: Plan) -> Finding:
    """All four take turns; each sample is the median of its turn."""
    store = BareStore(stage.mysql.dsn)
    key: list[float] = []
    floor: list[float] = []
    capabilities: list[float] = []
    insert: list[float] = []
    with bare_key_handler(stage) as bare_url:
        for _ in range(plan.rounds * plan.turns):
            capabilities.append(_median_us(f"{stage.alice.url}/capabilities", plan))
            insert.append(store.single_row_median_us(plan.inserts))
            key.append(_median_us(key_url(stage.alice, stage.bob), plan))
            stage.settle()
            floor.append(_median_us(bare_url, plan))
    store.close()
    stage.clear()
    parts = Figure("GET /capabilities", capabilities, _UNIT), Figure("bare INSERT and COMMIT", insert, _UNIT)
    sums = [sum(pair) for pair in zip(capabilities, insert, strict=True)]
    sum_of_parts = Figure("GET /capabilities + bare INSERT and COMMIT", sums, _UNIT)
    bare = Figure("bare handler that commits a key's rows", floor, _UNIT)
    one_caller = Figure("GET /key, one connection", key, _UNIT)
    lines = [
        Line(3, one_caller, sum_of_parts, Target("at most", 1.5)),
        Line(3, bare, sum_of_parts),
        Line(3, one_caller, bare),
    ]
    return Finding(lines, [f"item 3: {', '.join(f'{part.name} {part.spread()}' for part in parts)}"])


def _median_us(url: str, plan: Plan) -> float:
    return wrk.start(url, plan.turn_seconds, connections=1).result().median_us
