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
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from sandbox.client import get
from sandbox.key_provider import ROLES
from sandbox.ports import answers
from tests.waiting import wait_for

pytestmark = pytest.mark.usefixtures("only_demo")

CLONE = Path(__file__).resolve().parents[2]
DEMO_DIR = CLONE / ".demo"
PARTS = (*ROLES, "mysql", "rabbitmq")


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


def pids_of(part: str) -> list[int]:
    """The pids of a kind of server, or of a role at both key providers, by the state file."""
    now = state()
    if part in ROLES:
        return [int(pid) for kp in now["kps"].values() for pid in kp["processes"][part]]
    return [int(server["pid"]) for server in now[part]]


def all_pids() -> list[int]:
    return [pid for part in PARTS for pid in pids_of(part)]


def server_ports() -> list[int]:
    now = state()
    return [int(one["port"]) for one in now["mysql"]] + [urlsplit(one["url"]).port or 0 for one in now["rabbitmq"]]


def assert_what_is_killed_comes_back(part: str, source: str = "KP_Alice", target: str = "KP_Bob") -> None:
    """All of one kind at the same time, and the key that was answered before is not lost."""
    urls = {name: kp["http"] for name, kp in state()["kps"].items()}
    issued = get(urls[source], "key", remoteSystemID=target)
    assert issued.status == 200, issued.error
    old = set(pids_of(part))
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not old & set(pids_of(part)) and all(map(is_alive, pids_of(part))), timeout_seconds=10)
    wait_for(everything_is_healthy, timeout_seconds=30)
    # Key providers are healthy without a broker, and one that is told to end while it starts takes its time.
    wait_for(lambda: all(map(answers, server_ports())), timeout_seconds=60)
    retrieved = get(urls[target], "key", issued.body["keyId"], remoteSystemID=source)
    assert (retrieved.status, retrieved.error) == (200, "")
    assert retrieved.body == issued.body


def wait_until_ready(demo: subprocess.Popen[str]) -> None:
    def ready() -> bool:
        assert demo.poll() is None, finish(demo)
        return (DEMO_DIR / "state.json").exists()

    wait_for(ready, timeout_seconds=90)


@contextmanager
def running_demo(tmp_path: Path, **wishes: str) -> Iterator[subprocess.Popen[str]]:
    """A demo that is ready, until the end of the block."""
    process = start_demo(tmp_path, **wishes)
    try:
        wait_until_ready(process)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            finish(process)


def assert_a_signal_ends(
    demo: subprocess.Popen[str], folder: Path, number: signal.Signals, within_seconds: float
) -> None:
    """The exit code is 0, and no process, no folder and no state file is left."""
    pids = all_pids()
    started = time.monotonic()
    demo.send_signal(number)
    output = finish(demo)
    assert demo.returncode == 0, output
    assert time.monotonic() - started < within_seconds
    assert not any(is_alive(pid) for pid in pids)
    assert list(folder.iterdir()) == []
    assert not DEMO_DIR.exists()


@pytest.fixture(scope="class")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="class")
def demo(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """One demo for the tests that look at it or let it heal. The last of them ends it."""
    with running_demo(folder) as process:
        yield process


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

    @pytest.mark.parametrize("part", PARTS)
    def test_what_is_killed_comes_back_and_no_answered_key_is_lost(self, part: str) -> None:
        assert_what_is_killed_comes_back(part)

    def test_sigterm_ends_it_cleanly_and_leaves_nothing(self, demo: subprocess.Popen[str], folder: Path) -> None:
        assert_a_signal_ends(demo, folder, signal.SIGTERM, within_seconds=20)


def assert_once_tells_the_story_without_a_whole_key_and_leaves_nothing(tmp_path: Path) -> None:
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


def test_ctrl_c_ends_it_cleanly_and_leaves_nothing(tmp_path: Path) -> None:
    with running_demo(tmp_path) as demo:
        assert_a_signal_ends(demo, tmp_path, signal.SIGINT, within_seconds=20)


def test_a_killed_demo_takes_its_processes_along_and_the_next_one_with_once_tells_the_story(tmp_path: Path) -> None:
    demo = start_demo(tmp_path)
    wait_until_ready(demo)
    pids = all_pids()
    demo.kill()
    finish(demo)
    wait_for(lambda: not any(is_alive(pid) for pid in pids), timeout_seconds=10)
    assert_once_tells_the_story_without_a_whole_key_and_leaves_nothing(tmp_path)


@pytest.mark.parametrize("port_base", ["x", "80", "65531"])
def test_a_port_base_that_is_none_is_refused(tmp_path: Path, port_base: str) -> None:
    demo = start_demo(tmp_path, PORT_BASE=port_base)
    assert "PORT_BASE" in finish(demo)
    assert demo.returncode == 2
