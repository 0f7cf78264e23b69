"""Item 2: whether a key costs more when many are live.

Two fillings cannot take turns, so `/capabilities`, which no key slows down, is measured beside everything, and its
rate corrects for a machine that has changed meanwhile. Few keys are measured before and after the many. The keys
that a run itself makes or takes come on top of those that were there.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass, field

from bench import wrk
from bench.items.throughput import claim_rate, keys_for
from bench.plan import Plan
from bench.report import Figure, Finding, Line, Target
from bench.stage import Stage
from bench.waiting import key_url, tell


@dataclass
class _Rates:
    """Rates divided by that of `/capabilities` right before."""

    issued: list[float] = field(default_factory=list)
    claimed: list[float] = field(default_factory=list)


def measure(stage: Stage, plan: Plan) -> Finding:
    few, many = _Rates(), _Rates()
    rounds = max(1, plan.rounds // 2)
    _measure_at(stage, plan, plan.few_live_keys, few, rounds)
    _measure_at(stage, plan, plan.many_live_keys, many, plan.rounds)
    _measure_at(stage, plan, plan.few_live_keys, few, rounds)
    names = f"at {plan.many_live_keys:,} live keys", f"at {plan.few_live_keys:,} live keys"
    return Finding(
        [
            _line(f"GET /key {names[0]}", many.issued, names[1], few.issued),
            _line(f"GET /key/{{keyId}} {names[0]}", many.claimed, names[1], few.claimed),
        ]
    )


def _line(name: str, many: list[float], few_name: str, few: list[float]) -> Line:
    unit = "of /capabilities"
    return Line(2, Figure(name, many, unit), Figure(few_name, few, unit), Target("at least", 0.9))


def _measure_at(stage: Stage, plan: Plan, live_keys: int, rates: _Rates, rounds: int) -> None:
    """Half of the live keys wait at either KP; claims are drawn at random from all that wait at KP_Alice."""
    tell(f"  filling the store with {live_keys:,} keys")
    stage.fill(stage.alice, stage.bob, live_keys // 2)
    waiting = stage.fill(stage.bob, stage.alice, live_keys // 2)
    stage.settle()
    for _ in range(rounds):
        yardstick = wrk.rate(f"{stage.alice.url}/capabilities", plan.step_seconds)
        rates.issued.append(wrk.rate(key_url(stage.alice, stage.bob), plan.step_seconds) / yardstick)
        count = keys_for(yardstick, plan)
        waiting += stage.fill(stage.bob, stage.alice, count)
        random.shuffle(waiting)
        drawn, waiting = waiting[:count], waiting[count:]
        stage.settle()
        yardstick = statistics.mean([yardstick, wrk.rate(f"{stage.alice.url}/capabilities", plan.step_seconds)])
        rates.claimed.append(claim_rate(stage, drawn, plan) / yardstick)
        stage.settle()
    stage.clear()
