"""One running Compose project, made as the README tells operators to make it."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

from sandbox.ports import free_port
from tests.containers.engine import docker, inspect, left_of, run
from tests.waiting import wait_for

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def smoke(environ: Mapping[str, str], *folders: Path, wait_seconds: float = 60) -> str:
    """What compose/smoke prints for these folders. Raises EngineError where it fails."""
    command = (sys.executable, str(REPOSITORY / "compose" / "smoke"), *map(str, folders))
    environ = {**environ, "SMOKE_WAIT_SECONDS": str(wait_seconds)}
    return run(*command, timeout_seconds=wait_seconds + 60, environ=environ)


def skipctl_site(image: str, parent: Path, *arguments: str) -> str:
    """What `skipctl site …` prints, in the image and in a folder above those of sites, as the README has it."""
    mount = (f"--volume={parent}:{parent}", f"--workdir={parent}")
    return docker("run", "--rm", "--user=0", *mount, image, "skipctl", "site", *arguments)


class Stack:
    """The two key providers of compose/shared-store.yaml in a folder, and a project, of their own."""

    def __init__(self, parent: Path, image: str) -> None:
        self.image = image
        self.folder = parent / "site"
        self.project = f"skipbus-test-{secrets.token_hex(4)}"
        self._ports = {"ALICE_PORT": free_port(), "BOB_PORT": free_port()}
        self.environ = {
            **os.environ,
            "COMPOSE_PROJECT_NAME": self.project,
            "SKIPBUS_IMAGE": image,
            "ADDRESS": "127.0.0.1",
            **{name: str(port) for name, port in self._ports.items()},
        }

    def init(self, *arguments: str) -> None:
        """`skipctl site init` in the image, as the README has it."""
        skipctl_site(self.image, self.folder.parent, "init", self.folder.name, *arguments)

    def compose(self, *arguments: str, timeout_seconds: float = 240, stdin: str = "") -> str:
        """`docker compose …` for this project."""
        command = ("docker", "compose", "--project-directory", str(self.folder), *arguments)
        return run(*command, timeout_seconds=timeout_seconds, environ=self.environ, stdin=stdin)

    def up(self, *arguments: str) -> None:
        """Returns once every container is healthy."""
        self.compose("up", "--detach", "--wait", *arguments)

    def down(self) -> None:
        """Ends everything; nothing may be left."""
        self.compose("down", "--volumes", "--timeout", "10")
        left = left_of(self.project)
        assert left == [], f"down left {left}"

    def smoke(self, wait_seconds: float = 60) -> str:
        """What compose/smoke prints. Raises EngineError where it fails."""
        return smoke(self.environ, self.folder, wait_seconds=wait_seconds)

    def container(self, service: str) -> str:
        return f"{self.project}-{service}-1"

    def python(self, service: str, script: str) -> str:
        """What a script prints that runs in a service's container, with that service's account and files."""
        return self.compose("exec", "-T", service, "python", "-", stdin=script)

    def image_of(self, service: str) -> str:
        """The image that a service's container was made from."""
        return str(inspect(self.container(service))["Config"]["Image"])

    def state(self, service: str) -> str:
        """`healthy`, `unhealthy`, `starting`, or what the container is instead of running."""
        found = inspect(self.container(service))["State"]
        return str(found["Health"]["Status"] if found["Running"] else found["Status"])

    def wait_healthy(self, *services: str, timeout_seconds: float = 90) -> None:
        for service in services:
            wait_for(lambda: self.state(service) == "healthy", timeout_seconds=timeout_seconds, poll_seconds=0.5)  # noqa: B023 -- called at once
