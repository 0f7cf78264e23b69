"""The image: what is in it, who runs in it, and how it ends."""

from __future__ import annotations

import time

import pytest

from tests.containers.engine import docker, inspect
from tests.containers.stack import REPOSITORY

# The content of everything that skipbus installs, and its names and modes. (Times of layers tell when, not what.)
_DIGEST = """
import hashlib, os, pathlib
whole = hashlib.sha256()
for path in sorted(pathlib.Path('/opt/skipbus').rglob('*')):
    found = path.lstat()
    what = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ''
    whole.update(repr((str(path), found.st_mode, found.st_uid, what)).encode())
print(whole.hexdigest())
"""


def in_image(image: str, *command: str) -> str:
    return docker("run", "--rm", "--network=none", "--read-only", image, *command).strip()


def test_the_image_runs_as_a_user_without_rights(image: str) -> None:
    assert in_image(image, "id", "-u") == "10001"
    assert in_image(image, "find", "/opt/skipbus", "-writable", "-not", "-type", "l") == ""


def test_no_compiler_and_no_cache_is_left_in_the_image(image: str) -> None:
    tools = "for tool in gcc cc g++ make git; do command -v $tool; done; true"
    # Debian's own pip brings its wheels.
    kinds = (
        "-path '*/.cache/*' -o -name '*.whl' -not -path '/usr/share/*' -o -name '*.deb' -o -path '/var/lib/apt/lists/*'"
    )
    caches = f"find / -xdev \\( {kinds} \\) -type f 2>/dev/null; true"
    assert in_image(image, "sh", "-c", tools) == ""
    assert in_image(image, "sh", "-c", caches) == ""


def test_nothing_of_a_clone_or_of_an_index_gets_into_the_image(image: str) -> None:
    assert (
        in_image(
            image, "sh", "-c", "find / -xdev -name .git -o -name pip.conf -o -name direct_url.json 2>/dev/null; true"
        )
        == ""
    )


def test_the_labels_name_title_version_and_licence(image: str) -> None:
    labels = inspect(image)["Config"]["Labels"]
    assert labels["org.opencontainers.image.title"] == "skipbus"
    assert labels["org.opencontainers.image.version"] == in_image(image, "skipctl", "--version").split()[-1]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


@pytest.mark.parametrize("service", ["api", "syncer", "janitor"])
def test_the_command_starts_each_service(image: str, service: str) -> None:
    assert in_image(image, "skipbus", service, "--version").startswith(f"skip-{service} ")


def test_a_wrong_word_is_refused_with_code_2(image: str) -> None:
    result = docker("run", "--rm", image, "sh", "-c", "skipbus nonsense 2>&1; echo code $?")
    assert result.startswith("usage: skipbus")
    assert result.strip().endswith("code 2")


@pytest.mark.timed
def test_a_service_as_the_first_process_ends_within_ten_seconds_of_sigterm(image: str) -> None:
    keyring = "--tmpfs=/var/lib/skipbus/keyring:uid=10001,mode=0700"
    environment = [
        f"--env={pair}"
        for pair in (
            "SKIP_LOCAL_SYSTEM_ID=A",
            "SKIP_REMOTE_SYSTEM_ID_1=B",
            "MYSQL_USER=u",
            "MYSQL_PASSWORD=p",
            "MYSQL_DATABASE=d",
        )
    ]
    # The shell makes a keyring and then is the service.
    command = ("sh", "-c", "skipctl keyring init && exec skipbus api")
    name = docker("run", "--detach", "--read-only", "--cap-drop=ALL", keyring, *environment, image, *command).strip()
    try:
        _wait_for_log(name, '"listening"')
        assert docker("exec", name, "skipbus", "alive").strip() == "alive"
        begun = time.monotonic()
        docker("stop", "--time=30", name)
        assert time.monotonic() - begun < 10
        assert inspect(name)["State"]["ExitCode"] == 0
    finally:
        docker("rm", "--force", "--volumes", name)


def test_the_same_sources_make_the_same_files(image: str) -> None:
    again = f"{image}-again"
    docker("build", "--quiet", "--no-cache", "--tag", again, str(REPOSITORY), timeout_seconds=600)
    try:
        assert in_image(again, "python", "-c", _DIGEST) == in_image(image, "python", "-c", _DIGEST)
    finally:
        docker("image", "rm", "--force", again)


def _wait_for_log(container: str, text: str) -> None:
    deadline = time.monotonic() + 30
    while text not in docker("logs", container):
        assert time.monotonic() < deadline, docker("logs", container)
        time.sleep(0.2)
