"""Log lines that nobody read are counted where an operator looks when the log is silent: in the metrics."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.client import metric
from sandbox.key_provider import ROLES, KeyProvider
from sandbox.mariadb import Database
from sandbox.ports import LOOPBACK, free_port
from tests.waiting import wait_for


@pytest.fixture
def kp(tmp_path: Path) -> Iterator[KeyProvider]:
    """A key provider whose servers are away, so that its processes have something to say."""
    nowhere = Database(LOOPBACK, free_port(), "nobody", "no password", "nothing")
    env = {"SKIP_METRICS_PORT": str(free_port()), "SKIP_LOG_LEVEL": "debug"}
    made = KeyProvider(
        "KP_Alice", ["KP_Bob"], nowhere, f"amqp://{LOOPBACK}:{free_port()}/", root=tmp_path, env_overrides=env
    )
    made.make_files()
    yield made
    made.stop_all()


def dropped_lines(kp: KeyProvider) -> float | None:
    """The metric; None where the process does not serve it yet."""
    try:
        (dropped,) = metric(kp.environ["SKIP_METRICS_PORT"], "skipbus_log_lines_dropped_total")
    except OSError:
        return None
    return dropped


@pytest.mark.parametrize("role", ROLES)
def test_no_line_is_counted_as_dropped_while_somebody_reads(kp: KeyProvider, role: str) -> None:
    kp.start(role)
    wait_for(lambda: dropped_lines(kp) == 0, timeout_seconds=30)


@pytest.mark.parametrize("role", ROLES)
def test_lines_that_are_lost_with_their_reader_are_counted(kp: KeyProvider, role: str) -> None:
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", f"skipbus.services.{role}"], env=kp.environ, cwd=kp.root, stdout=writer
    )
    os.close(writer)
    os.close(reader)
    try:
        wait_for(lambda: (dropped_lines(kp) or 0) > 0, timeout_seconds=30)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
