"""`make demo TOPOLOGY=sites` as a user and as a tester meet it: its account, its state file, its healing, its end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.client import get
from sandbox.key_provider import ROLES
from tests.system.test_demo import (
    DEMO_DIR,
    everything_is_healthy,
    finish,
    is_alive,
    start_demo,
    state,
    wait_until_ready,
)
from tests.waiting import wait_for

pytestmark = pytest.mark.usefixtures("only_demo")

ALICE, BOB = "KP_Alice", "KP_Bob"
PARTS = [
    *[(kp, role) for kp in (ALICE, BOB) for role in ROLES],
    *[(kind, n) for kind in ("mysql", "rabbitmq") for n in (0, 1)],
]


def start_sites(tmp_path: Path, **wishes: str) -> subprocess.Popen[str]:
    return start_demo(tmp_path, TOPOLOGY="sites", **wishes)


def pid_of(part: tuple[str, str | int]) -> int:
    """The pid of a server, or of a process of a key provider, by its way through the state file."""
    name, which = part
    if isinstance(which, int):
        return int(state()[name][which]["pid"])
    return int(state()["kps"][name]["processes"][which][0])


def all_pids() -> list[int]:
    return [pid_of(part) for part in PARTS]


def exchange(source: str, target: str, size: str) -> None:
    urls = {name: kp["http"] for name, kp in state()["kps"].items()}
    issued = get(urls[source], "key", remoteSystemID=target, size=size)
    assert issued.status == 200, issued.error
    retrieved = get(urls[target], "key", issued.body["keyId"], remoteSystemID=source)
    assert retrieved.body == issued.body


@pytest.fixture(scope="class")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """One demo for the tests that only look at it or let it heal."""
    process = start_sites(tmp_path_factory.mktemp("demo"))
    try:
        wait_until_ready(process)
        yield process
    finally:
        process.terminate()
        finish(process)


@pytest.mark.usefixtures("demo")
class TestWhileItRuns:
    def test_the_state_file_lists_two_of_every_server(self) -> None:
        now = state()
        assert set(now) == {"kps", "mysql", "rabbitmq"}
        assert [len(now[kind]) for kind in ("mysql", "rabbitmq")] == [2, 2]
        assert len({server["port"] for server in now["mysql"]}) == 2
        assert len({server["url"] for server in now["rabbitmq"]}) == 2
        assert all(is_alive(pid) for pid in all_pids())

    def test_keys_of_stock_and_on_demand_go_both_ways(self) -> None:
        for size in ("256", "512"):
            exchange(ALICE, BOB, size)
            exchange(BOB, ALICE, size)

    def test_a_file_cuts_the_line_and_its_removal_heals_it(self) -> None:
        wish = DEMO_DIR / "cut"
        url = state()["kps"][ALICE]["http"]
        wish.touch()
        try:
            wait_for(lambda: get(url, "key", remoteSystemID=BOB, size="128").status == 500, timeout_seconds=10)
            exchange(ALICE, BOB, "256")
        finally:
            wish.unlink()
        wait_for(lambda: get(url, "key", remoteSystemID=BOB, size="128").status == 200, timeout_seconds=20)

    @pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part[0]}-{part[1]}")
    def test_what_is_killed_comes_back_and_no_answered_key_is_lost(self, part: tuple[str, str | int]) -> None:
        alice, bob = (state()["kps"][name]["http"] for name in (ALICE, BOB))
        wait_for(lambda: get(alice, "key", remoteSystemID=BOB).status == 200, timeout_seconds=30)
        issued = get(alice, "key", remoteSystemID=BOB)
        assert issued.status == 200, issued.error
        old = pid_of(part)
        os.kill(old, signal.SIGKILL)
        wait_for(lambda: pid_of(part) != old and is_alive(pid_of(part)), timeout_seconds=10)
        wait_for(everything_is_healthy, timeout_seconds=30)
        retrieved = get(bob, "key", issued.body["keyId"], remoteSystemID=ALICE)
        assert (retrieved.status, retrieved.error) == (200, "")
        assert retrieved.body == issued.body
        wait_for(lambda: get(alice, "key", remoteSystemID=BOB, size="128").status == 200, timeout_seconds=40)


def test_once_tells_of_the_cut_and_the_healing_and_leaves_nothing(tmp_path: Path) -> None:
    demo = start_sites(tmp_path, ONCE="1")
    output = finish(demo, timeout_seconds=150)
    assert demo.returncode == 0, output
    assert re.search(r"is cut.*from stock.*from stock.*healed.*stock full again", output, re.DOTALL), output
    assert re.search(r"\b[0-9a-f]{33,}", output) is None
    assert list(tmp_path.iterdir()) == []
    assert not DEMO_DIR.exists()


def test_ctrl_c_ends_it_cleanly_and_leaves_nothing(tmp_path: Path) -> None:
    demo = start_sites(tmp_path)
    wait_until_ready(demo)
    pids = all_pids()
    started = time.monotonic()
    demo.send_signal(signal.SIGINT)
    output = finish(demo)
    assert demo.returncode == 0, output
    assert time.monotonic() - started < 25
    assert not any(is_alive(pid) for pid in pids)
    assert list(tmp_path.iterdir()) == []
    assert not DEMO_DIR.exists()


@pytest.mark.parametrize("wish", [{"TOPOLOGY": "ring"}, {"TOPOLOGY": "sites", "PORT_BASE": "65525"}], ids=str)
def test_a_topology_or_a_port_base_that_is_none_is_refused(tmp_path: Path, wish: dict[str, str]) -> None:
    demo = start_demo(tmp_path, **wish)
    assert next(iter(reversed(wish))) in finish(demo)
    assert demo.returncode == 2
