"""Item 6: whether the api process grows with what it has answered."""

from __future__ import annotations

from bench import wrk
from bench.machine import resident_mib
from bench.plan import Plan
from bench.progress import tell
from bench.report import Figure, Finding, Line, Target
from bench.stage import Stage
from sandbox.processes import SandboxError

_ROUND = 8
_KEY_IDS_A_ROUND = 2
_LIMIT_MIB = 150.0
_LIMIT_RATIO = 1.05
_CONNECTIONS = 64


def measure(stage: Stage, plan: Plan) -> Finding:
    """A process that was started for this answers the mix; its memory is read halfway and at the end."""
    stage.restart_api()
    mixer = _Mixer(stage, plan)
    half = mixer.run_until(plan.memory_requests // 2)
    end = mixer.run_until(plan.memory_requests)
    stage.clear()
    at_end = Figure(f"api process after {plan.memory_requests:,} requests", [end], "MiB")
    at_half = Figure("after half of them", [half], "MiB")
    return Finding(
        [
            Line(6, at_end, target=Target("at most", _LIMIT_MIB, "MiB", end)),
            Line(6, at_end, at_half, Target("at most", _LIMIT_RATIO)),
        ]
    )


class _Mixer:
    """Sends the mix in runs of wrk and counts over all of them."""

    def __init__(self, stage: Stage, plan: Plan) -> None:
        self._stage = stage
        self._seconds = plan.step_seconds * 2
        self._sent = 0
        # Enough for the first run; then by what the run before has used.
        self._most_in_a_run = 20_000 * self._seconds

    def run_until(self, total: int) -> float:
        """Send until that many have been answered; the api's resident memory then, in MiB."""
        while self._sent < total:
            self._run()
            tell(f"  {self._sent:,} requests: {self._resident_mib():.1f} MiB")
        return self._resident_mib()

    def _resident_mib(self) -> float:
        return resident_mib(self._stage.alice.processes["api"].pid)

    def _run(self) -> None:
        count = self._most_in_a_run * _KEY_IDS_A_ROUND // _ROUND
        key_ids = self._stage.fill(self._stage.bob, self._stage.alice, count)
        self._stage.settle()
        run = wrk.start_mix(self._stage.alice.url, self._stage.bob.system_id, key_ids, self._seconds, self._sent)
        counted = run.result(refusals=True)
        _check_refusals(counted)
        self._sent += counted.requests
        self._most_in_a_run = counted.requests * 3 // 2
        self._stage.clear()


def _check_refusals(counted: wrk.Counted) -> None:
    """One in eight is to be refused, but for rounds that were cut short at the end."""
    if abs(counted.refused - counted.requests / _ROUND) > _CONNECTIONS:
        raise SandboxError(f"{counted.refused} of {counted.requests} requests were refused, not one in eight")
