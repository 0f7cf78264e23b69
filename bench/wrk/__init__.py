"""Runs wrk, one thread, over loopback, and reads what it counted.

A run counts only when every answer was as it should be: a refusal costs less than a key and would flatter.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox.processes import SandboxError, find_program

# wrk itself waits this long for nothing more than its own end.
_GRACE_SECONDS = 20
_FOLDER = Path(__file__).resolve().parent
_END = "skipbus "


@dataclass(frozen=True)
class Counted:
    """What one run counted. Latencies are wrk's, from a request's first byte to its answer's last."""

    requests: int
    duration_us: int
    refused: int
    broken: int
    median_us: int
    p99_us: int

    @property
    def per_second(self) -> float:
        return self.requests / self.duration_us * 1e6


class Run:
    """One run of wrk that has been started."""

    def __init__(self, command: Sequence[str], seconds: int, scratch: Path | None = None) -> None:
        self._seconds = seconds
        self._scratch = scratch
        self._deadline = time.monotonic() + seconds + _GRACE_SECONDS
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def result(self, *, refusals: bool = False) -> Counted:
        """Wait for its end. Raises SandboxError unless every answer was a 200; `refusals` lets others count."""
        try:
            output, _ = self._process.communicate(timeout=max(0.1, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise SandboxError(f"wrk did not end {_GRACE_SECONDS} s after its time") from error
        finally:
            self._process.kill()
            if self._scratch is not None:
                self._scratch.unlink()
        return _checked(output, refusals)


def start(url: str, seconds: int, *, connections: int = 64) -> Run:
    """Asks for one URL for `seconds`."""
    return Run(_command(connections, seconds, "end.lua", url), seconds)


def start_key_ids(url: str, remote_id: str, key_ids: Sequence[str], seconds: int) -> Run:
    """`GET /key/{keyId}` for each of the keyIds, once; more of them are needed than can be asked for."""
    return _start_from_file("key_ids.lua", url, remote_id, key_ids, seconds)


def start_mix(url: str, remote_id: str, key_ids: Sequence[str], seconds: int, first: int) -> Run:
    """The mix of `mix.lua`; its bad requests are numbered from `first`."""
    return _start_from_file("mix.lua", url, remote_id, key_ids, seconds, str(first))


def rate(url: str, seconds: int, *, connections: int = 64) -> float:
    """Answers in a second, over one run."""
    return start(url, seconds, connections=connections).result().per_second


def _start_from_file(script: str, url: str, remote_id: str, key_ids: Sequence[str], seconds: int, *more: str) -> Run:
    with tempfile.NamedTemporaryFile("w", prefix="skipbus-key-ids-", delete=False) as file:
        file.writelines(f"{key_id}\n" for key_id in key_ids)
    arguments = ["--", file.name, f"remoteSystemID={remote_id}", *more]
    return Run([*_command(64, seconds, script, url), *arguments], seconds, Path(file.name))


def _command(connections: int, seconds: int, script: str, url: str) -> list[str]:
    size = ["--threads", "1", "--connections", str(connections), "--duration", f"{seconds}s"]
    return [find_program("wrk"), *size, "--timeout", "10s", "--script", str(_FOLDER / script), url]


def _checked(output: str, refusals: bool) -> Counted:
    last = [line for line in output.splitlines() if line.startswith(_END)]
    if not last:
        raise SandboxError(f"wrk did not run\n{output}")
    counted = Counted(**json.loads(last[-1].removeprefix(_END)))
    if counted.broken or (counted.refused and not refusals):
        raise SandboxError(
            f"of {counted.requests} requests {counted.refused} were refused and {counted.broken} not answered: "
            "the figure would not count"
        )
    return counted
