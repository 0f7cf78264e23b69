"""The container engine as tests use it: commands with a deadline, and what an engine holds."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any


class EngineError(AssertionError):
    """A command of the engine failed; the message has its output."""


def run(*command: str, timeout_seconds: float = 120, environ: Mapping[str, str] | None = None, stdin: str = "") -> str:
    """A command's standard output. Raises EngineError where it fails or takes too long."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_seconds, env=environ, input=stdin, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"{' '.join(command[:4])} … took more than {timeout_seconds} s") from error
    if result.returncode != 0:
        output = (result.stdout + result.stderr)[-4000:]
        raise EngineError(f"{' '.join(command)} ended with {result.returncode}\n{output}")
    return result.stdout


def docker(*arguments: str, timeout_seconds: float = 120, stdin: str = "") -> str:
    """`docker …`"""
    return run("docker", *arguments, timeout_seconds=timeout_seconds, stdin=stdin)


def inspect(name: str) -> dict[str, Any]:
    """What the engine knows of a container or an image."""
    (found,) = json.loads(docker("inspect", name))
    assert isinstance(found, dict)
    return found


def crash(container: str, image: str) -> None:
    """SIGKILL to a container's first process, as a crash would: `docker kill` tells the engine not to restart it."""
    pid = inspect(container)["State"]["Pid"]
    kill = f"import os; os.kill({pid}, 9)"
    docker("run", "--rm", "--pid=host", "--user=0", image, "python", "-c", kill)


def logs(container: str) -> str:
    """Everything that a container wrote."""
    return run("sh", "-c", 'docker logs "$1" 2>&1', "sh", container)


def left_of(project: str) -> list[str]:
    """Containers, volumes and networks that a Compose project has left behind."""
    label = f"label=com.docker.compose.project={project}"
    listings: Sequence[Sequence[str]] = (("ps", "-aq"), ("volume", "ls", "-q"), ("network", "ls", "-q"))
    return [line for listing in listings for line in docker(*listing, "--filter", label).split()]
