"""What the profiler of ``bench.modules_per_flow`` notes of a process of ours."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from bench.modules_per_flow import Flow, usual_modules
from bench.traced import SOCKET_VARIABLE
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
# Runs a module whose functions are then called: `encoding` by name, `clock` by nobody.
SCRIPT = """
import sys
from skipbus.shared import clock
from skipbus.shared.protocol import encoding
for line in sys.stdin:
    encoding.pack([line])
    print(flush=True)
"""


def test_only_modules_whose_functions_ran_since_the_last_question_are_told(tmp_path: Path) -> None:
    (tmp_path / "traced_script.py").write_text(SCRIPT)
    path = tmp_path / "trace"
    environ = {**os.environ, SOCKET_VARIABLE: str(path), "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    command = [sys.executable, "-m", "bench.traced", "traced_script"]
    with (
        subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
        socket.socket(socket.AF_UNIX) as connection,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        wait_for(path.exists, timeout_seconds=20)
        connection.connect(str(path))
        answers = connection.makefile("r")

        def run_once() -> None:
            print(file=process.stdin, flush=True)
            assert process.stdout is not None
            assert process.stdout.readline() == "\n"

        def executed() -> list[str]:
            connection.sendall(b"\n")
            return list(json.loads(answers.readline()))

        run_once()
        executed()
        run_once()
        assert executed() == ["shared/protocol/encoding.py"]
        assert executed() == []
        answers.close()
        process.stdin.close()


def test_a_module_that_two_processes_run_counts_once_in_a_flow_and_twice_in_all_processes() -> None:
    flow = Flow("x", {"api of A": ["services.api.app", "shared.clock"], "syncer of A": ["shared.clock"]})
    assert flow.shown().splitlines()[0] == "x: 2 modules, 3 in all processes"


def test_what_slow_runs_do_by_the_clock_does_not_count() -> None:
    flow = {"api of A": ["services.api.app"], "janitor of A": []}
    ticked = {"api of A": ["services.api.app"], "janitor of A": ["services.janitor.epochs"]}
    runs = [(2.0, ticked), (0.01, flow), (2.1, ticked), (0.02, flow), (0.03, ticked)]
    assert usual_modules(runs, 3) == {"api of A": ["services.api.app"]}
