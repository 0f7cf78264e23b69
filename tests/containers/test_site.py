"""compose/site.yaml: one site comes up whole, and its front leads to both apis. Exchanges need the link to another."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.ports import free_port
from skipbus_testkit.client import Client, client_context
from tests.containers.engine import EngineError, docker
from tests.containers.stack import Stack

SERVICES = ("api", "api-b", "syncer", "janitor", "front", "mysql", "rabbitmq")


@pytest.fixture
def site(image: str, tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path, image)
    stack.environ |= {"FRONT_IMAGE": image, "SITE_PORT": str(free_port())}
    stack.init("--kp", "KP_Paris", "--peer", "KP_Oslo")
    yield stack
    stack.down()


def test_a_site_comes_up_healthy_and_both_apis_serve_behind_one_port(site: Stack) -> None:
    site.up()
    assert {service: site.state(service) for service in SERVICES} == dict.fromkeys(SERVICES, "healthy")
    files = site.folder / "clients" / "site"
    context = client_context(str(files / "ca.pem"), str(files / "client.pem"), str(files / "client.key"))
    client = Client(f"https://127.0.0.1:{site.environ['SITE_PORT']}", context)
    for _ in range(4):
        answer = client.get("capabilities")
        assert answer.body["localSystemID"] == "KP_Paris"
        assert answer.body["remoteSystemID"] == ["KP_Oslo"]
    for service in ("api", "api-b"):
        assert '"path":"/capabilities","status":200' in docker("logs", site.container(service))


def test_a_folder_that_holds_something_is_not_overwritten(site: Stack) -> None:
    before = {path: path.read_bytes() for path in site.folder.rglob("*") if path.is_file()}
    with pytest.raises(EngineError, match="nothing is overwritten"):
        site.init("--kp", "KP_Paris", "--peer", "KP_Oslo")
    assert {path: path.read_bytes() for path in site.folder.rglob("*") if path.is_file()} == before
    assert tomllib.loads((site.folder / "skipbus.toml").read_text()) == {"remote_system_ids": ["KP_Oslo"]}
