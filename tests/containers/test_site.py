"""compose/site.yaml: one site comes up whole before any other one is joined, and its front leads to both apis; and what
its folder becomes by hand-overs.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.ports import free_port
from skipbus_testkit.client import Client, client_context
from tests.containers.engine import EngineError, docker
from tests.containers.stack import Stack, skipctl_site

PARIS = ("--kp", "KP_Paris", "--peer", "KP_Oslo", "--broker", "paris.example")
SERVICES = ("api", "api-b", "syncer", "janitor", "front", "mysql", "rabbitmq")


@pytest.fixture
def site(image: str, tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path, image)
    stack.environ |= {"SITE_PORT": str(free_port()), "BROKER_PORT": str(free_port())}
    stack.init(*PARIS)
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
        site.init(*PARIS)
    assert {path: path.read_bytes() for path in site.folder.rglob("*") if path.is_file()} == before
    assert _toml(site.folder) == {"remote_system_ids": ["KP_Oslo"]}


def test_hand_overs_join_sites_and_a_third_one_later(image: str, tmp_path: Path) -> None:
    def site(*arguments: str) -> str:
        return skipctl_site(image, tmp_path, *arguments)

    site("init", "paris", *PARIS)
    site("init", "oslo", "--kp", "KP_Oslo", "--peer", "KP_Paris", "--broker", "oslo.example:5000")
    handed = tmp_path / "oslo" / "handover" / "KP_Oslo-to-KP_Paris.toml"
    assert handed.stat().st_mode & 0o777 == 0o600
    assert "compare it by telephone" in site("join", "paris", str(handed))
    (peer,) = _toml(tmp_path / "paris")["peers"]
    assert (peer["system_id"], peer["link"]) == ("KP_Oslo", "bus")
    assert peer["identity"] == (tmp_path / "oslo" / "identity").read_text().splitlines()[-1]

    made = site("invite", "paris", "KP_Rome")
    assert "KP_Paris-to-KP_Rome.toml" in made
    site("init", "rome", "--kp", "KP_Rome", "--peer", "KP_Paris", "--broker", "rome.example")
    site("join", "rome", "paris/handover/KP_Paris-to-KP_Rome.toml")
    site("join", "paris", "rome/handover/KP_Rome-to-KP_Paris.toml")
    assert [peer["system_id"] for peer in _toml(tmp_path / "paris")["peers"]] == ["KP_Oslo", "KP_Rome"]
    broker = tmp_path / "paris" / "rabbitmq" / "broker"
    definitions = json.loads((broker / "definitions.json").read_text())
    hosts = {entry["name"]: entry["value"]["uri"].rpartition("@")[2] for entry in definitions["parameters"]}
    assert hosts["KP_Oslo"].startswith("oslo.example:5000/")
    assert hosts["KP_Rome"].startswith("rome.example:5671/")
    # Who may fetch here: brokers of three authorities, the own one with them. Who is fetched from: each one's own.
    assert (broker / "authorities.pem").read_text().count("BEGIN CERTIFICATE") == 3
    assert sorted(path.name for path in (broker / "authorities").iterdir()) == ["KP_Oslo.pem", "KP_Rome.pem"]


def test_a_hand_over_for_another_site_or_with_another_identity_is_refused(image: str, tmp_path: Path) -> None:
    for name in ("oslo", "other"):
        arguments = ("--kp", "KP_Oslo", "--peer", "KP_Paris", "--peer", "KP_Rome", "--broker", f"{name}.example")
        skipctl_site(image, tmp_path, "init", name, *arguments)
    skipctl_site(image, tmp_path, "init", "paris", *PARIS)
    skipctl_site(image, tmp_path, "join", "paris", "oslo/handover/KP_Oslo-to-KP_Paris.toml")
    before = (tmp_path / "paris" / "rabbitmq" / "broker" / "definitions.json").read_text()
    with pytest.raises(EngineError, match="the hand-over is for KP_Rome"):
        skipctl_site(image, tmp_path, "join", "paris", "oslo/handover/KP_Oslo-to-KP_Rome.toml")
    with pytest.raises(EngineError, match="another identity of KP_Oslo"):
        skipctl_site(image, tmp_path, "join", "paris", "other/handover/KP_Oslo-to-KP_Paris.toml")
    assert (tmp_path / "paris" / "rabbitmq" / "broker" / "definitions.json").read_text() == before


def _toml(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "config" / "skipbus.toml").read_text())
