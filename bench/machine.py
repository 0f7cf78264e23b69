"""What the figures were taken on: a figure without its machine says nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from sandbox.processes import find_program


def describe(server_program: str) -> list[tuple[str, str]]:
    """(what, value) of this machine, now; `server_program` is the database server that is measured."""
    return [
        ("Date", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("Cores", str(os.cpu_count())),
        ("Memory", f"{_memory_gib():.0f} GiB"),
        ("CPU", _first_value("/proc/cpuinfo", "model name")),
        ("Kernel", f"{platform.system()} {platform.release()}"),
        ("Database", _version(server_program)),
        ("Python", platform.python_version()),
        ("Client", _version(find_program("wrk"))),
    ]


def resident_mib(pid: int) -> float:
    """Resident memory of a process. Raises OSError when it is gone."""
    return int(_first_value(f"/proc/{pid}/status", "VmRSS").split()[0]) / 1024


def file_system_of(path: Path) -> str:
    """The type of the file system that a folder is on."""
    answer = subprocess.run(
        ["stat", "--file-system", "--format=%T", str(path)], capture_output=True, text=True, check=True
    )
    return answer.stdout.strip()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _first_value(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


def _version(program: str) -> str:
    """The line in which a program says its version; wrk says it with exit code 1."""
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    line = (answer.stdout or answer.stderr).strip().splitlines()[0]
    return line.partition(" Copyright")[0].removeprefix(program).strip()
