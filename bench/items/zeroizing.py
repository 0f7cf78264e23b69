"""Item 5: how fast expired keys go, and what callers notice of it."""

from __future__ import annotations

import time
from typing import Any

import pymysql

from bench import wrk
from bench.plan import Plan
from bench.progress import tell
from bench.report import Figure, Finding, Line, Target
from bench.stage import Stage
from sandbox.processes import SandboxError

# The bound for 1,000,000 keys; a shorter run has its share of it.
_SECONDS_PER_MILLION = 60.0
_SLICE_SECONDS = 2
# Keys must not expire before the last of them is there: room for a machine that becomes slower.
_FILL_SPARE = 2.0
_TRIAL_KEYS = 10_000
_GIVE_UP_SECONDS = 300.0
_POLL_SECONDS = 0.1


class _Expired:
    """Looks at KP_Bob's oldest expired record, by the primary key."""

    def __init__(self, connection: pymysql.connections.Connection[Any], stage: Stage, until_ms: int) -> None:
        self._connection = connection
        self._of_bob = f"FROM `{stage.mysql.database}`.key_records WHERE target_id = '{stage.bob.system_id}'"
        self._from_ms = 0
        self._until_ms = until_ms

    def oldest(self) -> bytes | None:
        """Begins where it found one last: to look must not cost what is looked at."""
        with self._connection.cursor() as cursor:
            cursor.execute(
                f"SELECT expires_ms, key_id {self._of_bob} AND expires_ms BETWEEN {self._from_ms} AND {self._until_ms} "
                # With target_id in front, though it is constant, MariaDB would sort all that has expired.
                "ORDER BY expires_ms, key_id LIMIT 1"
            )
            row = cursor.fetchone()
        if row is None:
            return None
        self._from_ms = int(row[0])
        return bytes(row[1])


def measure(stage: Stage, plan: Plan) -> Finding:
    """KP_Bob's janitor is away until the keys have expired; the time counts from its start."""
    stage.bob.stop("janitor")
    tell(f"  filling the store with {plan.expired_keys:,} keys")
    until_ms = _fill_and_let_expire(stage, plan)
    tell("  all of them have expired")
    undisturbed = _slices(stage, plan)
    with stage.mysql.admin_connection() as connection:
        took_seconds, disturbed = _zeroize(stage, _Expired(connection, stage, until_ms))
    stage.settle()
    undisturbed += _slices(stage, plan)
    stage.clear()
    bound_seconds = _SECONDS_PER_MILLION * plan.expired_keys / 1e6
    took = Figure(f"{plan.expired_keys:,} expired keys zeroized", [took_seconds], "s")
    kept = Figure("GET /key while zeroizing", disturbed, "/s")
    return Finding(
        [
            Line(5, took, target=Target("at most", bound_seconds, "s", took_seconds)),
            Line(5, kept, Figure("undisturbed, right before and after", undisturbed, "/s"), Target("at least", 0.7)),
        ]
    )


def _fill_and_let_expire(stage: Stage, plan: Plan) -> int:
    """Fill, wait until nothing of it lives; UTC ms by which all has expired."""
    started = time.time()
    stage.fill(stage.alice, stage.bob, _TRIAL_KEYS, started)
    keys = plan.expired_keys - _TRIAL_KEYS
    expires_at = time.time() + (time.time() - started) * keys / _TRIAL_KEYS * _FILL_SPARE
    stage.fill(stage.alice, stage.bob, keys, expires_at)
    # A lifetime is whole seconds, at least one.
    until = expires_at + 2
    if time.time() > until:
        raise SandboxError("the keys expired before the last of them was in the store")
    stage.settle()
    time.sleep(max(0.0, until - time.time()))
    return int(time.time() * 1000)


def _slices(stage: Stage, plan: Plan) -> list[float]:
    return [_slice(stage).result().per_second for _ in range(plan.rounds)]


def _slice(stage: Stage) -> wrk.Run:
    return wrk.start(stage.alice.key_url(stage.bob), _SLICE_SECONDS)


def _zeroize(stage: Stage, expired: _Expired) -> tuple[float, list[float]]:
    """(seconds from the janitor's start until nothing was left, rates of `GET /key` while keys went)."""
    first = expired.oldest()
    started = time.monotonic()
    stage.bob.start("janitor")
    while expired.oldest() == first:
        _check_time(started)
        time.sleep(_POLL_SECONDS)
    rates: list[float] = []
    gone_at: float | None = None
    while gone_at is None:
        _check_time(started)
        run = _slice(stage)
        while run.running:
            if gone_at is None and expired.oldest() is None:
                gone_at = time.monotonic()
            time.sleep(_POLL_SECONDS)
        rates.append(run.result().per_second)
    # The last slice saw the janitor only in part.
    return gone_at - started, rates[:-1] or rates


def _check_time(started: float) -> None:
    if time.monotonic() - started > _GIVE_UP_SECONDS:
        raise SandboxError(f"the janitor has not zeroized the keys in {_GIVE_UP_SECONDS:.0f} s")
