"""The engine, the images and running stacks. Where there is no engine the tests fail; nothing is skipped.

The tests run in several processes (pytest-xdist), a file in one of them. What they make has names of its own; an image
has one name for the whole run, so the first process that asks builds it and the others wait for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.engine import docker
from tests.containers.stack import REPOSITORY, Stack

# A working copy's own, so that the tests of another one on the same engine do not change the image below these.
_TAG = f"test-{hashlib.sha256(str(REPOSITORY).encode()).hexdigest()[:8]}"
IMAGE = f"skipbus:{_TAG}"
TEST_IMAGE = f"skipbus-suites:{_TAG}"
STUNNEL_IMAGE = f"skipbus-stunnel:{_TAG}"


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
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run share, and no other run."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def image(engine: None, run_folder: Path) -> str:
    """The image of this working copy."""
    return _built_once(run_folder, IMAGE, str(REPOSITORY))


@pytest.fixture(scope="session")
def test_image(engine: None, run_folder: Path) -> str:
    """The image's Python with what tests need; they run in it with the working copy mounted at /skipbus."""
    dockerfile = str(REPOSITORY / "tests" / "containers" / "test.Dockerfile")
    return _built_once(run_folder, TEST_IMAGE, "--file", dockerfile, str(REPOSITORY / "requirements"))


@pytest.fixture(scope="session")
def stunnel_image(engine: None, run_folder: Path) -> str:
    """stunnel, as the profile of that name runs it."""
    return _built_once(run_folder, STUNNEL_IMAGE, str(REPOSITORY / "compose" / "stunnel"))


def _built_once(run_folder: Path, tag: str, *arguments: str) -> str:
    """Built by the first process that asks. To build again under the name would let Compose make containers anew."""
    with (run_folder / tag.replace(":", "-")).open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if file.read() == "":
            docker("build", "--quiet", "--tag", tag, *arguments, timeout_seconds=600)
            file.write("built")
    return tag


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
