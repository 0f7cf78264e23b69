"""Who keeps the cores busy during a measurement: what is at its limit, and what is not."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Self


class CpuMeter:
    """Cores that some processes, the client and the whole machine keep busy, over all its spans together."""

    def __init__(self, **pids: int) -> None:
        self._pids = pids
        self._used: dict[str, float] = {}
        self._seconds = 0.0

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._before = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        self._seconds += time.monotonic() - self._started
        for name, seconds in self._read().items():
            self._used[name] = self._used.get(name, 0.0) + seconds - self._before[name]

    def shown(self) -> str:
        """In words, such as "api 0.95, database 0.41, client 0.20, all 1.72 of 2 cores"."""
        cores = ", ".join(f"{name} {used / self._seconds:.2f}" for name, used in self._used.items())
        return f"{cores} of {os.cpu_count()} cores"

    def cores(self, name: str) -> float:
        """Cores that one of the processes kept busy."""
        return self._used[name] / self._seconds

    def others(self) -> float:
        """Cores that whatever is not measured here kept busy; the pids must be the bench's own to tell."""
        return (2 * self._used["all"] - sum(self._used.values())) / self._seconds

    def _read(self) -> dict[str, float]:
        client = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            **{name: _process_seconds(pid) for name, pid in self._pids.items()},
            # wrk is the only child that ends within a span.
            "client": client.ru_utime + client.ru_stime,
            "all": _machine_seconds(),
        }


def _process_seconds(pid: int) -> float:
    """Processor time of a process and its living children so far; 0 once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(_process_seconds(int(child)) for child in children)


def _machine_seconds() -> float:
    user, nice, system, _idle, _waiting, irq, softirq = (
        int(ticks) for ticks in Path("/proc/stat").read_text().split()[1:8]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
