"""Child processes that cannot outlive us, and their end.

Each child is the leader of a session of its own, so that Ctrl-C in a terminal reaches only the process that
started it, and is killed by the kernel when that process dies. Only processes started here are ever
signalled, and only while their pid cannot belong to anyone else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

POLL_SECONDS = 0.05


class SandboxError(Exception):
    """A private server or a key provider did not do what the sandbox asked of it."""


class Startable:
    """What is started, and stopped again; a block of `with` does both."""

    def start(self) -> None:
        """Returns once it serves. Raises SandboxError."""
        raise NotImplementedError

    def stop(self) -> None:
        """End it; nothing happens when it does not run."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Child:
    """One child process, its output appended to a log file."""

    def __init__(self, command: Sequence[str], *, environ: Mapping[str, str], log: Path, cwd: Path) -> None:
        # setpriv, not preexec_fn: Python code between fork and exec is not safe in a process with threads.
        guarded = ["setpriv", "--pdeathsig", "KILL", "--", *command]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                guarded,
                env=dict(environ),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.returncode is None and not _has_ended(self.pid)

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the signal; None while it runs."""
        if self._process.returncode is None and not self.running:
            self._reap(0)
        return self._process.returncode

    def terminate(self) -> None:
        """SIGTERM to the child alone, without waiting; nothing happens when it has ended."""
        if self.running:
            os.kill(self.pid, signal.SIGTERM)

    def send(self, number: signal.Signals) -> None:
        """A signal to the child alone, without waiting; nothing happens when it has ended."""
        if self.running:
            os.kill(self.pid, number)

    def stop(self, grace_seconds: float) -> None:
        """SIGTERM, then SIGKILL to the whole session after the grace."""
        self.terminate()
        self._reap(grace_seconds)

    def wait(self) -> int:
        """Wait for its end; the exit code. Nothing of its session is left, however the waiting ends."""
        try:
            while self.running:
                time.sleep(POLL_SECONDS)
        finally:
            self._reap(0)
        return self._process.returncode

    def wait_ready(self, ready: Callable[[], bool], name: str, timeout_seconds: float) -> None:
        """Wait until the child serves. Raises SandboxError with its log's end."""

        def is_ready() -> bool:
            if not self.running:
                raise SandboxError(f"{name} ended while it started\n{tail(self.log)}")
            return ready()

        wait_until(is_ready, lambda: f"{name} to start\n{tail(self.log)}", timeout_seconds)

    def kill(self) -> None:
        """SIGKILL to the whole session; clears up what a child that ended by itself left in it."""
        self._reap(0)

    def _reap(self, grace_seconds: float) -> None:
        if self._process.returncode is not None:
            return
        descendants = _descendants(self.pid)
        # Until it is reaped, even an ended leader keeps its number: the group cannot be someone else's.
        _wait_without_reaping(self.pid, grace_seconds)
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        _wait_until_gone(descendants, timeout_seconds=2)


def _has_ended(pid: int) -> bool:
    """Whether our child has ended, without reaping it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _wait_without_reaping(pid: int, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not _has_ended(pid):
        if time.monotonic() >= deadline:
            return
        time.sleep(POLL_SECONDS)


def _descendants(pid: int) -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        # A thread may end while it is looked at.
        with contextlib.suppress(OSError):
            children += [int(child) for child in task.read_text().split()]
    return children + [grandchild for child in children for grandchild in _descendants(child)]


def _wait_until_gone(pids: list[int], timeout_seconds: float) -> None:
    """A server's helpers (RabbitMQ's resolver, say) have sessions of their own and end when they miss it."""
    deadline = time.monotonic() + timeout_seconds
    while any(_is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(
    condition: Callable[[], bool],
    what: str | Callable[[], str],
    timeout_seconds: float = 120,
    poll_seconds: float = POLL_SECONDS,
) -> None:
    """Wait until the condition holds. Raises SandboxError, which says what was waited for."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            shown = what if isinstance(what, str) else what()
            raise SandboxError(f"waited {timeout_seconds:.0f} s for {shown}")
        time.sleep(poll_seconds)


def minimal_environ(home: Path) -> dict[str, str]:
    """What every child gets; nothing else of our own environment reaches it."""
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(home), "LANG": "C.UTF-8"}


def find_program(*names: str) -> str:
    """The path of the first of the programs that is installed. Raises SandboxError.

    Debian keeps servers in sbin, which is often not on a user's PATH.
    """
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
    for name in names:
        found = shutil.which(name, path=path)
        if found:
            return found
    raise SandboxError(f"none of {', '.join(names)} is installed; scripts/setup python servers installs them")


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log, for an error message."""
    if not log.exists():
        return "(no log)"
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
