"""The first process of a testkit container: one whole key provider, whose api also takes the tester's orders.

It unpacks the files that were copied in, makes the keyring, starts the three services, and ends all of them when one
of them ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

FILES = "/tmp/skipbus-testkit.tar"  # noqa: S108 -- in a container of its own
FOLDER = "/tmp/skipbus-testkit"  # noqa: S108
_POLL_SECONDS = 0.2
_STOP_SECONDS = 12.0


def main() -> int:
    """Runs until SIGTERM (0) or the end of one process (its code, or 1)."""
    os.umask(0o077)
    with tarfile.open(FILES) as archive:
        archive.extractall(FOLDER, filter="data")
    # The three services are in one container here, so they cannot share one metrics port.
    environ = os.environ | {"SKIP_METRICS_PORT": "0"}
    command = Path(sys.executable).with_name
    subprocess.run([command("skipctl"), "keyring", "init", "--if-missing"], env=environ, check=True)
    commands = (
        [sys.executable, f"{FOLDER}/api.py"],
        [command("skip-syncer")],
        [command("skip-janitor")],
    )
    processes = [subprocess.Popen(command, env=environ) for command in commands]
    try:
        return _await_first(processes)
    finally:
        _stop_all(processes)


def _await_first(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    stopped = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    while not stopped:
        for process in processes:
            if process.poll() is not None:
                return process.returncode or 1
        time.sleep(_POLL_SECONDS)
    return 0


def _stop_all(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
