"""Starts the yardsticks that are servers, each a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bench import bare_key_server
from bench.stage import Stage, get_bytes
from bench.waiting import wait_until
from sandbox.ports import LOOPBACK, answers, free_port
from sandbox.processes import Child, minimal_environ

_REPOSITORY = Path(__file__).resolve().parent.parent


@contextmanager
def bare_handler(stage: Stage) -> Iterator[str]:
    """A bare server that answers with the bytes of KP_Alice's own capabilities; its URL."""
    body = get_bytes(stage.alice.url, "/capabilities").decode()
    with _running(stage, "bench.bare_server", [body]) as url:
        yield f"{url}/capabilities"


@contextmanager
def bare_key_handler(stage: Stage) -> Iterator[str]:
    """A bare server that commits what a key is made of before it answers; its URL."""
    dsn = stage.mysql.dsn
    environ = {
        "MYSQL_HOST": dsn.host,
        "MYSQL_PORT": str(dsn.port),
        "MYSQL_USER": dsn.user,
        "MYSQL_PASSWORD": dsn.password,
        "MYSQL_DATABASE": dsn.database,
    }
    with _running(stage, "bench.bare_key_server", [], environ) as url:
        yield url + bare_key_server.PATH


@contextmanager
def _running(
    stage: Stage, module: str, arguments: list[str], environ: Mapping[str, str] | None = None
) -> Iterator[str]:
    port = free_port()
    child = Child(
        [sys.executable, "-m", module, str(port), *arguments],
        environ={**minimal_environ(stage.root), "PYTHONPATH": str(_REPOSITORY), **(environ or {})},
        log=stage.root / f"{module}.log",
        cwd=stage.root,
    )
    try:
        wait_until(lambda: answers(port), f"{module} to listen")
        yield f"http://{LOOPBACK}:{port}"
    finally:
        child.kill()
