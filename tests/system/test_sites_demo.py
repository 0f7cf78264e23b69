"""`make demo TOPOLOGY=sites` as a user and as a tester meet it: its account, its state file, its healing, its end."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.client import get
from tests.system.test_demo import (
    DEMO_DIR,
    PARTS,
    all_pids,
    assert_a_signal_ends,
    assert_what_is_killed_comes_back,
    finish,
    is_alive,
    running_demo,
    start_demo,
    state,
)
from tests.waiting import wait_for

pytestmark = pytest.mark.usefixtures("only_demo")

ALICE, BOB = "KP_Alice", "KP_Bob"


def exchange(source: str, target: str, size: str) -> None:
    urls = {name: kp["http"] for name, kp in state()["kps"].items()}
    issued = get(urls[source], "key", remoteSystemID=target, size=size)
    assert issued.status == 200, issued.error
    retrieved = get(urls[target], "key", issued.body["keyId"], remoteSystemID=source)
    assert retrieved.body == issued.body


@pytest.fixture(scope="class")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="class")
def demo(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """One demo for the tests that look at it or let it heal. The last of them ends it."""
    with running_demo(folder, TOPOLOGY="sites") as process:
        yield process


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

    @pytest.mark.parametrize("part", PARTS)
    def test_what_is_killed_comes_back_and_no_answered_key_is_lost(self, part: str) -> None:
        alice = state()["kps"][ALICE]["http"]
        wait_for(lambda: get(alice, "key", remoteSystemID=BOB).status == 200, timeout_seconds=30)
        assert_what_is_killed_comes_back(part)
        wait_for(lambda: get(alice, "key", remoteSystemID=BOB, size="128").status == 200, timeout_seconds=40)

    def test_ctrl_c_ends_it_cleanly_and_leaves_nothing(self, demo: subprocess.Popen[str], folder: Path) -> None:
        assert_a_signal_ends(demo, folder, signal.SIGINT, within_seconds=25)


def test_once_tells_of_the_cut_and_the_healing_and_leaves_nothing(tmp_path: Path) -> None:
    demo = start_demo(tmp_path, TOPOLOGY="sites", ONCE="1")
    output = finish(demo, timeout_seconds=150)
    assert demo.returncode == 0, output
    assert re.search(r"is cut.*from stock.*from stock.*healed.*stock full again", output, re.DOTALL), output
    assert re.search(r"\b[0-9a-f]{33,}", output) is None
    assert list(tmp_path.iterdir()) == []
    assert not DEMO_DIR.exists()


@pytest.mark.parametrize("wish", [{"TOPOLOGY": "ring"}, {"TOPOLOGY": "sites", "PORT_BASE": "65525"}], ids=str)
def test_a_topology_or_a_port_base_that_is_none_is_refused(tmp_path: Path, wish: dict[str, str]) -> None:
    demo = start_demo(tmp_path, **wish)
    assert next(iter(reversed(wish))) in finish(demo)
    assert demo.returncode == 2
