"""docs/openapi.yaml against a running api: each answer has a status that is described, and the members that are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from sandbox.key_provider import KeyProvider
from tests.system.harness import BOB, Lab, RawAnswer, RawConnection, ask, key_target

API: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "docs" / "openapi.yaml").read_text())
GETS = sorted(path for path, item in API["paths"].items() if "get" in item)
UNKNOWN_KEY = "ab" * 16


def followed(node: Any) -> Any:  # noqa: ANN401 -- any part of the document
    """What a reference leads to."""
    while isinstance(node, dict) and "$ref" in node:
        part: Any = API
        for name in str(node["$ref"]).removeprefix("#/").split("/"):
            part = part[name]
        node = part
    return node


def members(schema: Any) -> tuple[set[str], set[str]]:  # noqa: ANN401 -- any part of the document
    """The members that an object must have, and those that it may have."""
    schema = followed(schema)
    required, known = set(schema.get("required", ())), set(schema.get("properties", ()))
    for part in schema.get("allOf", ()):
        more_required, more_known = members(part)
        required, known = required | more_required, known | more_known
    return required, known


def assert_described(answer: RawAnswer, path: str, method: str = "get") -> None:
    responses = API["paths"][path][method]["responses"]
    assert str(answer.status) in responses, f"{path} answered {answer.status} {answer.body!r}"
    response = followed(responses[str(answer.status)])
    (media_type, content) = next(iter(response["content"].items()))
    assert answer.headers["content-type"].startswith(media_type)
    required, known = members(content["schema"])
    assert required <= answer.json.keys() <= known
    for name in response.get("headers", ()):
        # Retry-After is for those who may come again.
        assert name.lower() in answer.headers, f"{path} {answer.status} has no {name}"


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/capabilities", "/capabilities"),
        ("/entropy", "/entropy?minentropy=128"),
        ("/health", "/health"),
        ("/status/sync", "/status/sync"),
    ],
)
def test_what_is_asked_for_without_a_key_is_answered_as_described(alice: KeyProvider, path: str, target: str) -> None:
    answer = ask(alice, target)
    assert answer.status == 200
    assert_described(answer, path)


def test_peers_have_the_members_that_are_described(alice: KeyProvider) -> None:
    peer = ask(alice, "/status/sync").json["peers"][BOB]
    required, known = members(API["components"]["schemas"]["Peer"])
    assert required <= peer.keys() <= known
    assert peer["inbound"].keys() == members(API["components"]["schemas"]["Counters"])[0]


def test_a_key_is_issued_and_fetched_as_described(shared_lab: Lab, alice: KeyProvider, bob: KeyProvider) -> None:
    issued = ask(alice, key_target(remoteSystemID=BOB, size="512"))
    assert issued.status == 200
    assert_described(issued, "/key")
    properties = API["components"]["schemas"]["Key"]["properties"]
    assert all(re.fullmatch(properties[name]["pattern"], issued.json[name]) for name in ("keyId", "key"))
    key_id = issued.json["keyId"]
    fetched = ask(bob, key_target(key_id, remoteSystemID=alice.system_id))
    assert fetched.status == 200
    assert_described(fetched, "/key/{keyId}")
    assert fetched.json == issued.json


@pytest.mark.parametrize(
    ("path", "target", "status"),
    [
        ("/key", "/key", 400),
        ("/key", key_target(remoteSystemID="KP_Nobody"), 400),
        ("/key", key_target(remoteSystemID=BOB, size="127"), 400),
        ("/key/{keyId}", key_target(UNKNOWN_KEY, remoteSystemID=BOB), 400),
        ("/key/{keyId}", key_target("xyz", remoteSystemID=BOB), 400),
        ("/entropy", "/entropy?minentropy=9000", 400),
    ],
)
def test_a_refusal_is_as_described(alice: KeyProvider, path: str, target: str, status: int) -> None:
    answer = ask(alice, target)
    assert answer.status == status
    assert_described(answer, path)


@pytest.mark.parametrize("path", GETS)
def test_a_body_or_an_expectation_is_refused_as_described(alice: KeyProvider, path: str) -> None:
    target = path.replace("{keyId}", UNKNOWN_KEY) + f"?remoteSystemID={quote(BOB)}"
    with RawConnection(alice.port) as connection:
        connection.send(f"GET {target} HTTP/1.1\r\nHost: kp.example\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        answer = connection.read()
    assert answer.status == 413
    assert_described(answer, path)
    answer = ask(alice, target, headers="Expect: tea\r\n")
    assert answer.status == 417
    assert_described(answer, path)


@pytest.mark.parametrize("path", sorted(API["paths"]))
def test_another_method_is_a_405_that_names_the_right_one(alice: KeyProvider, path: str) -> None:
    methods = ", ".join(name.upper() for name in API["paths"][path])
    target = path.replace("{keyId}", UNKNOWN_KEY)
    answer = ask(alice, target, method="DELETE")
    assert answer.status == 405
    assert answer.headers["allow"] == methods
