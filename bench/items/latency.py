"""Item 3: how long a caller waits for a key over a store link, alone and with 63 others.

The p99 stands beside the p99 of a bare commit: what the machine itself does to one request in a hundred.
"""

from __future__ import annotations

import statistics

from bench import wrk
from bench.bare_store import BareStore
from bench.plan import Plan
from bench.report import Figure, Finding, Line, Target, p99
from bench.stage import Stage

_CONNECTIONS = 64


def measure(stage: Stage, plan: Plan) -> Finding:
    """All take turns; each sample is the median, or the p99, of its turn."""
    store = BareStore(stage.mysql.dsn)
    key, capabilities = stage.alice.key_url(stage.bob), f"{stage.alice.url}/capabilities"
    alone: list[wrk.Counted] = []
    together: list[wrk.Counted] = []
    commits_us: list[list[float]] = []
    sums_us: list[float] = []
    for _ in range(plan.rounds * plan.turns):
        capabilities_us = wrk.start(capabilities, plan.turn_seconds, connections=1).result().median_us
        commits_us.append(store.single_row_times_us(plan.inserts))
        sums_us.append(capabilities_us + statistics.median(commits_us[-1]))
        alone.append(wrk.start(key, plan.turn_seconds, connections=1).result())
        together.append(wrk.start(key, plan.turn_seconds, connections=_CONNECTIONS).result())
        stage.settle()
    store.close()
    stage.clear()
    parts = Figure("GET /capabilities + bare INSERT and COMMIT", _ms(sums_us), "ms")
    commit_p99 = Figure("p99 of a bare INSERT and COMMIT", _ms([p99(times) for times in commits_us]), "ms")
    one_caller = Figure("GET /key, one connection", _ms([run.median_us for run in alone]), "ms")
    one_p99 = Figure("p99 of GET /key, one connection", _ms([run.p99_us for run in alone]), "ms")
    many_p99 = Figure(f"p99 of GET /key, {_CONNECTIONS} connections", _ms([run.p99_us for run in together]), "ms")
    return Finding(
        [
            Line(3, one_caller, parts, Target("at most", 2.2)),
            Line(3, one_p99, commit_p99),
            Line(3, many_p99, commit_p99),
        ]
    )


def _ms(times_us: list[float]) -> list[float]:
    return [time_us / 1000 for time_us in times_us]
