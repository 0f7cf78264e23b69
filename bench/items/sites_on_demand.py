"""Item 8: how long one caller waits for a key that is placed at the other site meanwhile, next to its bare floor."""

from __future__ import annotations

from bench import wrk
from bench.bare_link import BareLink
from bench.plan import Plan
from bench.report import Figure, Finding, Line, Target
from bench.stage import Stage

_UNIT = "µs"


def measure(stage: Stage, plan: Plan) -> Finding:
    """The two take turns; each sample is the median of its turn."""
    sites = stage.sites()
    sites.set_up(stock=0)
    floor = BareLink(sites.sites)
    bare: list[float] = []
    keys: list[float] = []
    for _ in range(plan.rounds * plan.turns):
        bare.append(floor.round_median_us(plan.placings))
        keys.append(wrk.start(sites.on_demand_url(), plan.turn_seconds, connections=1).result().median_us)
        sites.settle()
    line = Line(
        8,
        Figure("GET /key on demand over a bus link, one connection", keys, _UNIT),
        Figure("bare: 4 durable commits and 4 hops over the bus", bare, _UNIT),
        Target("at most", 2.0),
    )
    return Finding([line])
