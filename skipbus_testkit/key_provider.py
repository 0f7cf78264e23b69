"""The first process of a testkit container: one whole key provider, and the proxy in front of it.

It unpacks the files that were put in, makes the keyring, starts the three services and the proxy, and ends, with all of
them, when one of them does. TLS is the proxy's, by the api's own code; the api keeps its plain port to this container.
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
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SKIP_TLS_")}
    environ["SKIP_METRICS_PORT"] = "0"
    command = Path(sys.executable).with_name
    subprocess.run([command("skipctl"), "keyring", "init", "--if-missing"], env=environ, check=True)
    proxy = [sys.executable, "-m", "skipbus_testkit.proxy"]
    processes = [
        *(subprocess.Popen([command("skipbus"), role], env=environ) for role in ("api", "syncer", "janitor")),
        subprocess.Popen(proxy, env=os.environ | {"SKIP_METRICS_PORT": "0"}),
    ]
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
