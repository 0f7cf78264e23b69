"""Item 2: whether a key costs more when many are live.

Few and many are measured within a second of each other, by the same processes, on a machine whose speed may be another
a second later. The keys that a run itself makes or takes come on top of those that were there; from the few they are
cleared away in each round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from bench import wrk
from bench.fillings import Filling
from bench.items.throughput import claim_rate, keys_for
from bench.plan import Plan
from bench.progress import tell
from bench.report import Figure, Finding, Line, Target
from bench.stage import Stage


@dataclass(frozen=True)
class _Turns:
    """What is measured with one filling, turn by turn."""

    filling: Filling
    measures: Sequence[Callable[[], float]]

    def rate(self, turn: int) -> float:
        with self.filling.shown():
            return self.measures[turn]()


@dataclass
class _Compared:
    """Answers in a second with few and with many; `shares` are the latter, divided by the mean of the two beside."""

    few: list[float] = field(default_factory=list)
    many: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def take_turns(self, few: _Turns, many: _Turns) -> None:
        """Few, many, few and so on; few have one more turn."""
        self.few.append(few.rate(0))
        for turn in range(len(many.measures)):
            self.many.append(many.rate(turn))
            self.few.append(few.rate(turn + 1))
            self.shares.append(self.many[-1] / statistics.mean(self.few[-2:]))

    def line(self, name: str, plan: Plan) -> Line:
        few = Figure(f"at {plan.few_live_keys:,}, turn by turn", self.few, "/s")
        many = Figure(f"{name} at {plan.many_live_keys:,} live keys", self.many, "/s")
        return Line(2, many, few, Target("at least", 0.9), self.shares)

    def note(self, name: str) -> str:
        """The spread of the ratios, which says how much the machine itself changes from turn to turn."""
        return f"item 2: {name}, {len(self.shares)} ratios {Figure(name, self.shares, '').spread()}".rstrip()


def measure(stage: Stage, plan: Plan) -> Finding:
    issued, claimed = _Compared(), _Compared()
    issue = partial(wrk.rate, stage.alice.key_url(stage.bob), plan.turn_seconds)
    with stage.mysql.admin_connection() as connection:
        connection.select_db(stage.mysql.database)
        few = Filling(stage, connection, "few", plan.few_live_keys)
        many = Filling(stage, connection, "many", plan.many_live_keys)
        tell(f"  filling the store with {plan.many_live_keys:,} keys")
        many.refill()
        for _ in range(plan.rounds):
            few.refill()
            stage.settle()
            issued.take_turns(_Turns(few, [issue] * (plan.turns + 1)), _Turns(many, [issue] * plan.turns))
            count = keys_for(max(issued.few), plan.turn_seconds)
            few_claims = _claims(stage, plan, few.draw(plan.turns + 1, count))
            many_claims = _claims(stage, plan, many.draw(plan.turns, count))
            stage.settle()
            claimed.take_turns(_Turns(few, few_claims), _Turns(many, many_claims))
            stage.settle()
        few.drop()
        many.drop()
    stage.clear()
    named = ("GET /key", issued), ("GET /key/{keyId}", claimed)
    return Finding([one.line(name, plan) for name, one in named], [one.note(name) for name, one in named])


def _claims(stage: Stage, plan: Plan, draws: Sequence[list[str]]) -> list[Callable[[], float]]:
    return [partial(claim_rate, stage, key_ids, plan.turn_seconds) for key_ids in draws]
