"""`make demo` as a user and as a tester meet it: its account, its state file, its healing, its end."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.client import get
from sandbox.key_provider import ROLES
from tests.waiting import wait_for

pytestmark = pytest.mark.usefixtures("only_demo")

CLONE = Path(__file__).resolve().parents[2]
DEMO_DIR = CLONE / ".demo"


def start_demo(tmp_path: Path, **wishes: str) -> subprocess.Popen[str]:
    environ = {name: value for name, value in os.environ.items() if name not in ("ONCE", "PORT_BASE", "TOPOLOGY")}
    return subprocess.Popen(
        [sys.executable, "-m", "sandbox.demo"],
        cwd=CLONE,
        env=environ | {"TMPDIR": str(tmp_path)} | wishes,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(demo: subprocess.Popen[str], *, timeout_seconds: float = 90) -> str:
    output, _ = demo.communicate(timeout=timeout_seconds)
    return output


def state() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DEMO_DIR / "state.json").read_text())
    return loaded


def everything_is_healthy() -> bool:
    try:
        return all(get(kp["http"], "health").status == 200 for kp in state()["kps"].values())
    except (OSError, ValueError):
        return False


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def all_pids() -> list[int]:
    now = state()
    of_kps = [pid for kp in now["kps"].values() for pids in kp["processes"].values() for pid in pids]
    return [*of_kps, now["mysql"][0]["pid"], now["rabbitmq"][0]["pid"]]


def pid_of(part: tuple[str, ...]) -> int:
    """The pid of a server, or of a process of a key provider, by its way through the state file."""
    entry = state()
    if len(part) == 1:
        return int(entry[part[0]][0]["pid"])
    return int(entry["kps"][part[0]]["processes"][part[1]][0])


def wait_until_ready(demo: subprocess.Popen[str]) -> None:
    def ready() -> bool:
        assert demo.poll() is None, finish(demo)
        return (DEMO_DIR / "state.json").exists()

    wait_for(ready, timeout_seconds=90)


@pytest.fixture(scope="class")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """One demo for the tests that only look at it or let it heal."""
    process = start_demo(tmp_path_factory.mktemp("demo"))
    try:
        wait_until_ready(process)
        yield process
    finally:
        process.terminate()
        finish(process)


PARTS = [
    *[(kp, role) for kp in ("KP_Alice", "KP_Bob") for role in ROLES],
    ("mysql",),
    ("rabbitmq",),
]


@pytest.mark.usefixtures("demo")
class TestWhileItRuns:
    def test_the_state_file_names_everything_and_only_its_owner_reads_it(self) -> None:
        now = state()
        assert stat.S_IMODE((DEMO_DIR / "state.json").stat().st_mode) == 0o600
        assert set(now) == {"kps", "mysql", "rabbitmq"}
        for kp in now["kps"].values():
            assert set(kp["processes"]) == set(ROLES)
            assert Path(kp["keyring"]).is_dir()
            assert {log.name for log in Path(kp["log_dir"]).iterdir()} == {f"{role}.log" for role in ROLES}
        assert set(now["mysql"][0]) == {"host", "port", "user", "password", "database", "pid", "datadir"}
        assert set(now["rabbitmq"][0]) == {"url", "pid"}
        assert all(is_alive(pid) for pid in all_pids())

    def test_a_second_demo_in_this_clone_says_so_and_harms_nothing(self, tmp_path: Path) -> None:
        second = start_demo(tmp_path)
        assert "another demo runs" in finish(second)
        assert second.returncode == 2
        assert everything_is_healthy()

    @pytest.mark.parametrize("part", PARTS, ids="/".join)
    def test_what_is_killed_comes_back_and_no_answered_key_is_lost(self, part: tuple[str, ...]) -> None:
        alice, bob = (state()["kps"][name]["http"] for name in ("KP_Alice", "KP_Bob"))
        issued = get(alice, "key", remoteSystemID="KP_Bob")
        assert issued.status == 200, issued.error
        old = pid_of(part)
        os.kill(old, signal.SIGKILL)
        wait_for(lambda: pid_of(part) != old and is_alive(pid_of(part)), timeout_seconds=10)
        wait_for(everything_is_healthy, timeout_seconds=30)
        retrieved = get(bob, "key", issued.body["keyId"], remoteSystemID="KP_Alice")
        assert (retrieved.status, retrieved.error) == (200, "")
        assert retrieved.body == issued.body


def test_once_tells_the_story_without_a_whole_key_and_leaves_nothing(tmp_path: Path) -> None:
    demo = start_demo(tmp_path, ONCE="1")
    output = finish(demo)
    assert demo.returncode == 0, output
    assert re.findall(r"refused, ([a-zA-Z ]+):", output) == 2 * [
        "wrong remoteSystemID",
        "the wrong key provider",
        "a second time",
    ]
    assert re.search(r"\b[0-9a-f]{33,}", output) is None
    assert list(tmp_path.iterdir()) == []
    assert not DEMO_DIR.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_it_cleanly_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    demo = start_demo(tmp_path)
    wait_until_ready(demo)
    pids = all_pids()
    started = time.monotonic()
    demo.send_signal(number)
    output = finish(demo)
    assert demo.returncode == 0, output
    assert time.monotonic() - started < 20
    assert not any(is_alive(pid) for pid in pids)
    assert list(tmp_path.iterdir()) == []
    assert not DEMO_DIR.exists()


def test_a_killed_demo_takes_its_processes_along_and_does_not_stop_the_next(tmp_path: Path) -> None:
    demo = start_demo(tmp_path)
    wait_until_ready(demo)
    pids = all_pids()
    demo.kill()
    finish(demo)
    wait_for(lambda: not any(is_alive(pid) for pid in pids), timeout_seconds=10)
    following = start_demo(tmp_path, ONCE="1")
    output = finish(following)
    assert following.returncode == 0, output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("port_base", ["x", "80", "65531"])
def test_a_port_base_that_is_none_is_refused(tmp_path: Path, port_base: str) -> None:
    demo = start_demo(tmp_path, PORT_BASE=port_base)
    assert "PORT_BASE" in finish(demo)
    assert demo.returncode == 2
