"""When the demo's supervisor starts something again, with a clock of the test's own."""

from __future__ import annotations

from sandbox.supervisor import Watch


class Recorder:
    """Something that dies when it is ordered to, and notes when it was started again."""

    pid = 1

    def __init__(self) -> None:
        self.up = True
        self.stays_up = True
        self.now = 0.0
        self.revived_at: list[float] = []

    def is_up(self) -> bool:
        return self.up

    def revive(self) -> None:
        self.revived_at.append(self.now)
        self.up = self.stays_up


def run(watch: Watch, unit: Recorder, *, until: float) -> None:
    """Check ten times a second, in exact tenths."""
    while unit.now < until:
        unit.now = round(unit.now + 0.1, 1)
        watch.check(unit.now)


def test_what_dies_is_started_again_after_half_a_second() -> None:
    unit = Recorder()
    watch = Watch(unit)
    run(watch, unit, until=20)
    unit.up = False
    run(watch, unit, until=30)
    assert unit.revived_at == [20.6]


def test_what_does_not_stay_up_is_started_ever_later_but_at_least_every_five_seconds() -> None:
    unit = Recorder()
    unit.up = unit.stays_up = False
    run(Watch(unit), unit, until=30)
    pauses = [round(b - a, 1) for a, b in zip(unit.revived_at, unit.revived_at[1:], strict=False)]
    assert pauses[:6] == [1.1, 2.1, 4.1, 5.1, 5.1, 5.1]


def test_what_had_settled_is_started_quickly_again() -> None:
    unit = Recorder()
    watch = Watch(unit)
    for death in (20, 40, 60):
        run(watch, unit, until=death)
        unit.up = False
    run(watch, unit, until=70)
    assert unit.revived_at == [20.6, 40.6, 60.6]


def test_what_comes_back_by_itself_is_left_alone() -> None:
    unit = Recorder()
    watch = Watch(unit)
    run(watch, unit, until=1)
    unit.up = False
    run(watch, unit, until=1.3)
    unit.up = True
    run(watch, unit, until=20)
    assert unit.revived_at == []
