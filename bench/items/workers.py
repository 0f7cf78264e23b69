"""Item 4: what a second api process gains, and what stands in its way."""

from __future__ import annotations

from bench import wrk
from bench.cpu import CpuMeter
from bench.plan import Plan
from bench.report import Figure, Finding, Line, Target
from bench.stage import Stage
from sandbox.key_provider import KeyProvider


class _Turns:
    """One of the two that take turns."""

    def __init__(self, stage: Stage, key_provider: KeyProvider) -> None:
        self._url = key_provider.key_url(stage.bob)
        self.meter = CpuMeter(api=key_provider.processes["api"].pid, database=stage.mysql.pid)
        self.rates: list[float] = []

    def take(self, seconds: int) -> None:
        with self.meter:
            self.rates.append(wrk.rate(self._url, seconds))


def measure(stage: Stage, plan: Plan) -> Finding:
    """KP_Alice has two apis for the time, of one process and of two; whose turn it is not is idle."""
    two_workers = stage.second_api(workers=2)
    one, two = _Turns(stage, stage.alice), _Turns(stage, two_workers)
    for _ in range(plan.rounds):
        for turns in (one, two):
            turns.take(plan.step_seconds)
            stage.settle()
    two_workers.stop_all()
    stage.clear()
    two_rates, one_rates = Figure("GET /key, two api workers", two.rates, "/s"), Figure("one worker", one.rates, "/s")
    line = Line(4, two_rates, one_rates, Target("at least", 1.15))
    return Finding([line], [f"item 4: with one worker {one.meter.shown()}; with two {two.meter.shown()}"])
