"""Item 11: the line between the sites is cut under a load that the stock can carry, and healed.

Every answered key is fetched at the other site: half of them immediately, while the line is cut, the rest after it is
healed. Each must be there, be the same, and be there once.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from bench.plan import Plan
from bench.progress import tell
from bench.report import Figure, Finding, Line, Target
from bench.sites_stage import SitesStage
from bench.stage import Stage
from sandbox.key_provider import KeyProvider
from sandbox.ports import LOOPBACK
from sandbox.processes import SandboxError, wait_until
from skipbus_testkit.client import request_target

_CALLERS = 4
_PER_SECOND = 160
# So much of the stock may be used up: more than half, so that it is being filled up when the line heals.
_CARRIED_SHARE = 0.6
_FULL_SECONDS = 10.0
_SETTLED_SECONDS = 2
_TWICE = 400


@dataclass
class _Encryptors:
    """What some callers were answered. `given_out` are keyIds of keys that were fetched already."""

    keys: dict[str, str] = field(default_factory=dict)
    given_out: set[str] = field(default_factory=set)
    failed: list[str] = field(default_factory=list)
    doubled: int = 0
    lost: int = 0


def measure(stage: Stage, plan: Plan) -> Finding:
    sites = stage.sites()
    stock = int(_PER_SECOND * (plan.cut_seconds + _SETTLED_SECONDS) / _CARRIED_SHARE)
    sites.set_up(stock)
    load = _Encryptors()
    stop = threading.Event()
    with ThreadPoolExecutor(_CALLERS) as pool:
        callers = [pool.submit(_call, sites, load, stop) for _ in range(_CALLERS)]
        time.sleep(_SETTLED_SECONDS)
        tell(f"  the line is cut for {plan.cut_seconds} s, at {sites.count_placed():,} of {stock:,} keys in stock")
        cut = time.monotonic()
        sites.sites.cable.cut("hang")
        _check_cut(sites)
        time.sleep(cut + plan.cut_seconds - time.monotonic())
        left = sites.count_placed()
        stop.set()
        for caller in callers:
            caller.result()
        sites.sites.cable.heal()
    healed = time.monotonic()
    wait_until(lambda: sites.count_placed() >= stock, "the stock to be full")
    full_seconds = time.monotonic() - healed
    tell(f"  {len(load.keys):,} keys were answered; stock full again after {full_seconds:.1f} s")
    _fetch_the_rest(sites, load)
    load.doubled += _fetched_again(sites, list(load.keys)[:: max(1, len(load.keys) // _TWICE)])
    lines = [
        _none(f"requests that failed, of {len(load.keys) + len(load.failed):,}", len(load.failed)),
        _none("keys lost", load.lost),
        _none("keys given twice", load.doubled),
        Line(
            11,
            Figure("stock full again after the healing", [full_seconds], "s"),
            target=Target("at most", _FULL_SECONDS, "s", full_seconds),
        ),
    ]
    note = (
        f"item 11: {_PER_SECOND} keys/s, the line was cut for {plan.cut_seconds} s; "
        f"{left:,} of {stock:,} keys were left in stock"
    )
    return Finding(lines, [note, *load.failed[:3]])


def _check_cut(sites: SitesStage) -> None:
    """Raises SandboxError when a key that is not in stock is answered: then the line was not cut."""
    status, _ = _Connection(sites.alice).get("key", remoteSystemID=sites.bob.system_id, size="512")
    if status == 200:
        raise SandboxError("a key was placed over the line that is cut")


def _none(name: str, count: int) -> Line:
    return Line(11, Figure(name, [count], ""), target=Target("at most", 0, "", count))


def _call(sites: SitesStage, load: _Encryptors, stop: threading.Event) -> None:
    """One pair of encryptors, at an even pace."""
    source, sink = _Connection(sites.alice), _Connection(sites.bob)
    pause_seconds = _CALLERS / _PER_SECOND
    due = time.monotonic()
    turn = 0
    while not stop.wait(max(0.0, due - time.monotonic())):
        due += pause_seconds
        turn += 1
        status, body = source.get("key", remoteSystemID=sites.bob.system_id)
        if status != 200:
            load.failed.append(f"{status} {body}")
            continue
        key_id = body["keyId"]
        load.doubled += key_id in load.keys
        load.keys[key_id] = body["key"]
        if turn % 2:
            _fetch(sites, sink, load, key_id)


def _fetch(sites: SitesStage, connection: _Connection, load: _Encryptors, key_id: str) -> None:
    status, body = connection.get("key", key_id, remoteSystemID=sites.alice.system_id)
    load.given_out.add(key_id)
    load.lost += status != 200 or body["key"] != load.keys[key_id]


def _fetch_the_rest(sites: SitesStage, load: _Encryptors) -> None:
    connection = _Connection(sites.bob)
    for key_id in load.keys.keys() - load.given_out:
        _fetch(sites, connection, load, key_id)
    if len(set(load.keys.values())) != len(load.keys):
        raise SandboxError("two keyIds had one key")


def _fetched_again(sites: SitesStage, key_ids: Sequence[str]) -> int:
    """How many of these are given out a second time. Each is waited for, so many are asked for in parallel."""

    def again(key_id: str) -> int:
        return _Connection(sites.bob).get("key", key_id, remoteSystemID=sites.alice.system_id)[0]

    with ThreadPoolExecutor(50) as pool:
        return sum(status == 200 for status in pool.map(again, key_ids))


class _Connection:
    """One kept connection to a key provider."""

    def __init__(self, kp: KeyProvider) -> None:
        self._connection = http.client.HTTPConnection(LOOPBACK, kp.port, timeout=20)

    def get(self, *path: str, **query: str) -> tuple[int, dict[str, str]]:
        self._connection.request("GET", request_target(*path, **query))
        response = self._connection.getresponse()
        return response.status, json.loads(response.read())
