"""What `skipctl site init` and `skipctl db provision` write: definitions, grants, and what they refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from skipbus.ctl.__main__ import main
from skipbus.ctl.broker_definitions import (
    SiteDefinitions,
    configuration,
    definitions,
    own_names,
    password_hash,
    site_configuration,
    upstream_uri,
)
from skipbus.ctl.provision import ROLES, statements
from skipbus.ctl.shipped import read_shipped
from skipbus.shared.broker.names import dead_queue_name, live_queue_name, queue_name
from skipbus.shared.errors import OperatorError
from skipbus.shared.protocol.envelopes import MAX_ENVELOPE_BYTES


def test_the_password_hash_is_the_one_of_rabbitmqs_documentation() -> None:
    known = "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR"
    assert password_hash("test12", bytes.fromhex("908DC60A")) == known


def test_definitions_hold_no_password() -> None:
    text = definitions({"KP_A": ("a_syncer", "the-password")})
    assert "the-password" not in text
    assert [user["name"] for user in json.loads(text)["users"]] == ["a_syncer"]


@pytest.mark.parametrize("system_id", ["KP_A", "KP B.1", "a+b", "x|y"])
def test_a_syncers_pattern_matches_its_own_queues_and_nobody_elses(system_id: str) -> None:
    pattern = re.compile(own_names(system_id))
    for name in (queue_name(system_id), live_queue_name(system_id), dead_queue_name(system_id)):
        assert pattern.search(name)
        assert not pattern.search(name + "2")
    assert pattern.search("skipbus.envelopes")
    assert not pattern.search(queue_name("KP_Other"))
    assert not pattern.search("own")


def test_the_account_of_another_site_reaches_its_own_federation_alone() -> None:
    made = SiteDefinitions.make("KP_A", "site_syncer", "the-password")
    made.admit("KP B", "federation.KP:20B", "another-password")
    (rights,) = [entry for entry in json.loads(made.text())["permissions"] if entry["user"] == "federation.KP:20B"]
    own = "federation: skipbus.envelopes -> KP:20B"
    for name in (own, f"{own} A", f"{own} B"):
        assert all(re.search(rights[right], name) for right in ("configure", "write", "read"))
    for name in (own + "2", "federation: skipbus.envelopes -> KP_C", queue_name("KP_A"), "own"):
        assert not any(re.search(rights[right], name) for right in ("configure", "write", "read"))
    assert not re.search(rights["write"], "skipbus.envelopes")


def test_a_site_that_is_admitted_or_joined_again_stands_there_once_with_what_is_new() -> None:
    made = SiteDefinitions.make("KP_A", "site_syncer", "the-password")
    for attempt in ("one", "two"):
        made.admit("KP_B", "federation.KP_B", attempt)
        made.fetch_from("KP_B", upstream_uri("federation.KP_A", attempt, "b.example", 5671, "/ca.pem"))
        made = SiteDefinitions(made.text())
    found = json.loads(made.text())
    assert [user["name"] for user in found["users"]] == ["site_syncer", "federation.KP_B"]
    assert [entry["user"] for entry in found["permissions"]] == ["site_syncer", "federation.KP_B"]
    (upstream,) = found["parameters"]
    assert upstream["value"]["uri"].startswith("amqps://federation.KP_A:two@b.example:5671/%2f?cacertfile=%2Fca.pem&")
    assert "verify=verify_peer&server_name_indication=b.example" in upstream["value"]["uri"]


def test_every_place_of_the_template_is_filled_in() -> None:
    made = SiteDefinitions.make("KP_A", "site_syncer", "the-password")
    made.admit("KP_B", "federation.KP_B", "one")
    made.fetch_from("KP_B", "amqps://b.example")
    assert "${" not in made.text()


@pytest.mark.parametrize("role", ROLES)
def test_grants_name_the_account_and_the_database_and_give_no_right_on_everything(role: str) -> None:
    made = list(statements(read_shipped(f"grants/{role}.sql"), "'account'@'%'", "`store`"))
    assert made
    for statement in made:
        assert re.fullmatch(r"GRANT [A-Z, ]+ ON `store`\.[a-z_]+ TO 'account'@'%'", statement)
        assert not {"ALL", "GRANT OPTION", "CREATE", "ALTER", "DROP", "INDEX"} & set(re.findall(r"[A-Z]+", statement))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--kp", "KP_A"],
        ["--kp", "KP_A", "--kp", "KP_A"],
        ["--kp", "KP_A", "--kp", "KP_B", "--peer", "KP_C"],
        ["--kp", "KP_*", "--kp", "KP_B"],
        ["--kp", "KP$A", "--kp", "KP_B"],
        ["--kp", "KP_A", "--peer", "KP_B"],
        ["--kp", "KP_A", "--peer", "KP_A", "--broker", "a.example"],
        ["--kp", "KP_A", "--peer", "KP_B", "--broker", "192.0.2.1"],
        ["--kp", "KP_A", "--kp", "KP_B", "--broker", "a.example"],
    ],
)
def test_a_site_that_cannot_be_is_refused_before_anything_is_written(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["site", "init", str(tmp_path / "site"), *arguments], {}) == 1
    assert capsys.readouterr().err.startswith("skipctl: ")
    assert not (tmp_path / "site").exists()


def test_what_did_not_come_with_the_installation_is_said() -> None:
    with pytest.raises(OperatorError, match="not part of this installation"):
        read_shipped("no-such-file")


def test_the_shipped_broker_takes_every_envelope_and_hardly_more() -> None:
    for text in (configuration(), site_configuration("KP_A")):
        (limit,) = re.findall(r"^max_message_size = (\d+)$", text, re.MULTILINE)
        assert MAX_ENVELOPE_BYTES < int(limit) <= MAX_ENVELOPE_BYTES + 65_536


@pytest.mark.parametrize("name", ["shared-store.yaml", "site.yaml", "two-apis.yaml"])
def test_what_compose_mounts_from_the_host_is_labelled_for_selinux(name: str) -> None:
    text = (Path(__file__).parents[2] / "compose" / name).read_text()
    mounts = re.findall(r"\./[^\s:\"]+:/[^\s\"\]]+", text)
    assert mounts
    assert [mount for mount in mounts if not mount.endswith((":z", ":ro,z"))] == []
