"""Item 8: how long a caller waits for a key that is placed at the other site on demand, next to its bare floor.

The p99 is that of callers who come 20 times a second, each on a connection of its own, as encryptors do.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from bench import wrk
from bench.bare_link import BareLink
from bench.bare_store import BareStore
from bench.plan import Plan
from bench.report import Figure, Finding, Line, Target, p99
from bench.sites_stage import SitesStage
from bench.stage import Stage
from sandbox.client import get
from sandbox.processes import SandboxError

_PER_SECOND = 20
# More than can wait at the same time: a caller gives up after 10 s.
_CALLERS = 64


def measure(stage: Stage, plan: Plan) -> Finding:
    """All take turns; each sample is the median, or the p99, of its turn."""
    sites = stage.sites()
    sites.set_up(stock=0)
    floor, store = BareLink(sites.sites), BareStore(sites.sites.mysql_servers[0].dsn)
    bare: list[float] = []
    keys: list[float] = []
    for _ in range(plan.rounds * plan.turns):
        bare.append(floor.round_median_us(plan.placings) / 1000)
        keys.append(wrk.start(sites.on_demand_url(), plan.turn_seconds, connections=1).result().median_us / 1000)
        sites.settle()
    paced: list[float] = []
    commits: list[float] = []
    for _ in range(plan.rounds):
        commits.append(p99(store.single_row_times_us(plan.inserts)) / 1000)
        paced.append(p99(_paced(sites, plan.step_seconds * 2)))
        sites.settle()
    store.close()
    on_demand = Figure("GET /key on demand over a bus link, one connection", keys, "ms")
    commits_and_hops = Figure("bare: 4 durable commits and 4 hops over the bus", bare, "ms")
    at_pace = Figure(f"p99 of GET /key on demand, {_PER_SECOND} requests/s", paced, "ms")
    return Finding(
        [
            Line(8, on_demand, commits_and_hops, Target("at most", 3.0)),
            Line(8, at_pace, Figure("p99 of a bare INSERT and COMMIT", commits, "ms")),
        ]
    )


def _paced(sites: SitesStage, seconds: int) -> list[float]:
    """Times of the answers in ms. Raises SandboxError when a request was refused."""
    started = time.monotonic()
    with ThreadPoolExecutor(_CALLERS) as callers:
        asked = []
        for number in range(seconds * _PER_SECOND):
            time.sleep(max(0.0, started + number / _PER_SECOND - time.monotonic()))
            asked.append(callers.submit(_ask, sites))
        return [answer.result() for answer in asked]


def _ask(sites: SitesStage) -> float:
    started = time.monotonic()
    answer = get(sites.alice.url, "key", remoteSystemID=sites.bob.system_id, size="512")
    if answer.status != 200:
        raise SandboxError(f"GET /key on demand was answered {answer.status} {answer.error}")
    return (time.monotonic() - started) * 1000
