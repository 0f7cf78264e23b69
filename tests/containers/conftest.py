"""The engine, the image and running stacks. Where there is no engine the tests fail; nothing is skipped."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.containers.engine import docker
from tests.containers.stack import REPOSITORY, Stack

IMAGE = "skipbus:test"
TEST_IMAGE = "skipbus-suites:test"


@pytest.fixture(scope="session")
def engine() -> None:
    """A container engine with Compose that answers."""
    try:
        for question in (["docker", "info"], ["docker", "compose", "version"]):
            subprocess.run(question, capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.fail(
            "there is no container engine to test with: install and start Docker with Compose, so that `docker info` "
            f"and `docker compose version` work ({type(error).__name__})",
            pytrace=False,
        )


@pytest.fixture(scope="session")
def image(engine: None) -> str:
    """The image of this working copy."""
    docker("build", "--quiet", "--tag", IMAGE, str(REPOSITORY), timeout_seconds=600)
    return IMAGE


@pytest.fixture(scope="session")
def test_image(engine: None) -> str:
    """The image's Python with what tests need; they run in it with the working copy mounted at /skipbus."""
    dockerfile = str(REPOSITORY / "tests" / "containers" / "test.Dockerfile")
    context = str(REPOSITORY / "requirements")
    docker("build", "--quiet", "--file", dockerfile, "--tag", TEST_IMAGE, context, timeout_seconds=600)
    return TEST_IMAGE


@pytest.fixture(scope="module")
def shared_store(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two key providers over one store, running; each test leaves them so."""
    stack = Stack(tmp_path_factory.mktemp("shared_store"), image)
    stack.init("--kp", "KP_Alice", "--kp", "KP_Bob")
    try:
        stack.up()
        yield stack
    finally:
        stack.down()


@pytest.fixture(scope="session")
def stunnel_image(engine: None) -> str:
    """stunnel, as the profile of that name runs it."""
    tag = "skipbus-stunnel:test"
    docker("build", "--quiet", "--tag", tag, str(REPOSITORY / "compose" / "stunnel"), timeout_seconds=300)
    return tag
