"""The profile `stunnel`: the same exchange with TLS outside of the api, and after the api's container came back."""

from __future__ import annotations

from pathlib import Path

from tests.containers.engine import crash, docker, logs
from tests.containers.stack import Stack
from tests.waiting import wait_for


def test_keys_are_exchanged_through_stunnel_and_again_after_a_crash_of_the_api(
    image: str, stunnel_image: str, tmp_path: Path
) -> None:
    stack = Stack(tmp_path, image)
    stack.environ |= {"COMPOSE_PROFILES": "stunnel", "TLS_TARGET": "9443", "STUNNEL_IMAGE": stunnel_image}
    stack.init("--kp", "KP_Alice", "--kp", "KP_Bob")
    try:
        stack.up()
        stack.smoke()
        assert "Service [skip] accepted connection" in logs(stack.container("alice-stunnel"))
        crash(stack.container("alice-api"), image)
        wait_for(lambda: _restarts(stack, "alice-stunnel") > 0, timeout_seconds=40)
        stack.smoke()
    finally:
        stack.down()


def _restarts(stack: Stack, service: str) -> int:
    return int(docker("inspect", "--format={{.RestartCount}}", stack.container(service)))
