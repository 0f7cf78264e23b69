"""The draft's methods exactly (Tables 2 to 9, Figures 3, 5 and 7), and the earlier server's extra pages."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from sandbox.key_provider import KeyProvider
from sandbox.ports import LOOPBACK
from tests.system.harness import ALICE, BOB, Lab, RawAnswer, RawConnection, ask, key_target, request_bytes

JSON = "application/json; charset=utf-8"
LOWER_HEX = re.compile(r"(?:[0-9a-f]{2})+")


def assert_json(answer: RawAnswer, status: int = 200) -> None:
    assert answer.status == status
    assert answer.headers["content-type"] == JSON


def assert_key(answer: RawAnswer, size_bits: int = 256) -> None:
    """Figure 5 and Table 6: keyId and key, hexadecimal, and nothing that a cache may keep."""
    assert_json(answer)
    assert set(answer.json) == {"keyId", "key"}
    assert len(answer.json["keyId"]) == 32
    assert LOWER_HEX.fullmatch(answer.json["key"])
    assert len(answer.json["key"]) == size_bits // 4
    assert answer.headers["cache-control"] == "no-store"


# --- capabilities: Figure 3, Table 4


def test_capabilities_have_the_fields_of_figure_3_and_no_others(alice: KeyProvider) -> None:
    answer = ask(alice, "/capabilities")
    assert_json(answer)
    assert answer.json == {
        "entropy": True,
        "key": True,
        "algorithm": "pqc",
        "localSystemID": ALICE,
        "remoteSystemID": [BOB],
    }


def test_capabilities_ignore_a_query(alice: KeyProvider) -> None:
    assert ask(alice, "/capabilities?x=1&remoteSystemID=nobody").json["localSystemID"] == ALICE


# --- key: Figure 5, Tables 6 and 7


def test_a_key_has_256_bits_and_its_id_128_unless_asked_otherwise(alice: KeyProvider) -> None:
    answer = ask(alice, f"/key?remoteSystemID={BOB}")
    assert_key(answer)
    assert LOWER_HEX.fullmatch(answer.json["keyId"])


@pytest.mark.parametrize("size_bits", range(128, 513, 8))
def test_every_size_from_128_to_512_reaches_the_other_end(shared_lab: Lab, alice: KeyProvider, size_bits: int) -> None:
    answer = ask(alice, f"/key?remoteSystemID={BOB}&size={size_bits}")
    assert_key(answer, size_bits)
    key = shared_lab.issue(alice, BOB, size=str(size_bits))
    shared_lab.assert_retrievable(key)


def test_no_two_keys_or_key_ids_are_alike(shared_lab: Lab, alice: KeyProvider) -> None:
    keys = [shared_lab.issue(alice, BOB) for _ in range(50)]
    assert len({key.key_id for key in keys}) == len({key.key for key in keys}) == 50


def test_keys_go_both_ways(shared_lab: Lab, alice: KeyProvider, bob: KeyProvider) -> None:
    shared_lab.assert_retrievable(shared_lab.issue(alice, BOB))
    shared_lab.assert_retrievable(shared_lab.issue(bob, ALICE))


@pytest.mark.parametrize("spell", [str.upper, str.lower, str.title])
def test_a_key_id_is_accepted_in_any_case_and_answered_as_it_was_asked(
    shared_lab: Lab, alice: KeyProvider, bob: KeyProvider, spell: Callable[[str], str]
) -> None:
    key = shared_lab.issue(alice, BOB)
    asked = spell(key.key_id)
    answer = ask(bob, key_target(asked, remoteSystemID=ALICE))
    assert_key(answer)
    assert answer.json == {"keyId": asked, "key": key.key}


@pytest.mark.parametrize("parameter", ["remoteSystemID", "remoteSystemId"])
def test_both_spellings_of_remote_system_id_are_accepted(
    shared_lab: Lab, alice: KeyProvider, bob: KeyProvider, parameter: str
) -> None:
    assert_key(ask(alice, f"/key?{parameter}={BOB}"))
    key = shared_lab.issue(alice, BOB)
    assert_key(ask(bob, f"/key/{key.key_id}?{parameter}={ALICE}"))


def test_a_key_is_gone_after_it_was_handed_out(shared_lab: Lab, alice: KeyProvider, bob: KeyProvider) -> None:
    key = shared_lab.issue(alice, BOB)
    shared_lab.assert_retrievable(key)
    answer = ask(bob, key_target(key.key_id, remoteSystemID=ALICE))
    assert_json(answer, 400)
    assert "keyId" in answer.error


@pytest.mark.parametrize("digits", [32, 48, 128])
def test_an_unknown_key_id_is_400(bob: KeyProvider, digits: int) -> None:
    answer = ask(bob, key_target("ab" * (digits // 2), remoteSystemID=ALICE))
    assert_json(answer, 400)
    assert set(answer.json) == {"error"}


# --- entropy: Figure 7, Tables 8 and 9


@pytest.mark.parametrize("bits", [8, 16, 128, 256, 1024, 8184, 8192])
def test_entropy_has_the_asked_length(alice: KeyProvider, bits: int) -> None:
    answer = ask(alice, f"/entropy?minentropy={bits}")
    assert_json(answer)
    assert set(answer.json) == {"randomStr", "minentropy"}
    assert answer.json["minentropy"] == bits
    assert re.fullmatch(r"[0-9A-F]+", answer.json["randomStr"])
    assert len(answer.json["randomStr"]) == bits // 4
    assert answer.headers["cache-control"] == "no-store"


def test_entropy_has_256_bits_unless_asked_otherwise(alice: KeyProvider) -> None:
    answers = [ask(alice, "/entropy").json for _ in range(20)]
    assert {answer["minentropy"] for answer in answers} == {256}
    assert len({answer["randomStr"] for answer in answers}) == 20


# --- paths and methods: Tables 2 and 3

UNKNOWN_PATHS = [
    "/",
    "/keys",
    "/Key",
    "/KEY?remoteSystemID=KP_Bob",
    "/capabilities/",
    "/capabilities/x",
    "/entropy/256",
    "/status",
    "/status/sync/",
    "/key/" + "ab" * 16 + "/x",
    "/key/" + "ab" * 16 + "/x?remoteSystemID=KP_Bob",
    "/key//x",
    "/key/../capabilities",
    "/%2e%2e/key",
    "/../key?remoteSystemID=KP_Bob",
    "//key",
    "/capabilities%00",
    "/metrics",
    "/favicon.ico",
]


@pytest.mark.parametrize("path", UNKNOWN_PATHS)
def test_a_path_outside_table_2_is_404(alice: KeyProvider, path: str) -> None:
    answer = ask(alice, path)
    assert_json(answer, 404)
    assert set(answer.json) == {"error"}


@pytest.mark.parametrize("path", ["/key/", "/key//", "/key/x", "/key/" + "ab" * 16 + "%2Fx", "/key/" + "ab" * 16 + "/"])
def test_one_segment_behind_key_is_a_key_id_however_malformed(alice: KeyProvider, path: str) -> None:
    answer = ask(alice, path)
    assert_json(answer, 400)
    assert "keyId" in answer.error


def test_a_path_below_a_key_does_not_take_the_key(shared_lab: Lab, alice: KeyProvider) -> None:
    key = shared_lab.issue(alice, BOB)
    target = f"/key/{key.key_id}/x?remoteSystemID={ALICE}"
    assert ask(shared_lab.kps[BOB], target).status == 404
    shared_lab.assert_retrievable(key)


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "PROPFIND"])
@pytest.mark.parametrize(
    "path", ["/capabilities", "/key?remoteSystemID=KP_Bob", "/key/" + "ab" * 16, "/entropy", "/status/sync"]
)
def test_any_method_but_get_is_405_with_allow(alice: KeyProvider, method: str, path: str) -> None:
    answer = ask(alice, path, method=method)
    assert answer.status == 405
    assert answer.headers["allow"] == "GET"
    assert answer.headers["content-type"] == JSON
    assert method == "HEAD" or set(answer.json) == {"error"}


def test_health_answers_head_without_a_body_and_refuses_other_methods(alice: KeyProvider) -> None:
    answer = ask(alice, "/health", method="HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["content-type"] == JSON
    answer = ask(alice, "/health", method="POST")
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


def test_a_wrong_method_neither_issues_nor_takes_a_key(shared_lab: Lab, alice: KeyProvider) -> None:
    key = shared_lab.issue(alice, BOB)
    for method in ("HEAD", "POST", "DELETE"):
        assert ask(shared_lab.kps[BOB], key_target(key.key_id, remoteSystemID=ALICE), method=method).status == 405
    shared_lab.assert_retrievable(key)


def test_the_absolute_form_of_a_target_is_understood(shared_lab: Lab, alice: KeyProvider, bob: KeyProvider) -> None:
    origin = f"http://{LOOPBACK}:{alice.port}"
    assert ask(alice, f"{origin}/capabilities").json["localSystemID"] == ALICE
    assert_key(ask(alice, f"{origin}/key?remoteSystemID={BOB}"))
    key = shared_lab.issue(alice, BOB)
    answer = ask(bob, f"http://{LOOPBACK}:{bob.port}/key/{key.key_id}?remoteSystemID={ALICE}")
    assert answer.json["key"] == key.key


def test_a_percent_encoded_path_and_query_are_understood(shared_lab: Lab, alice: KeyProvider, bob: KeyProvider) -> None:
    assert ask(alice, "/%63apabilities").json["localSystemID"] == ALICE
    assert_key(ask(alice, "/k%65y?remoteSystemID=%4BP_%42ob&size=%3256"))
    assert_key(ask(alice, "/key?remote%53ystemID=KP_Bob"))
    key = shared_lab.issue(alice, BOB)
    escaped = "".join(f"%{ord(digit):02x}" for digit in key.key_id)
    assert ask(bob, f"/key/{escaped}?remoteSystemID={ALICE}").json["key"] == key.key


def test_one_connection_serves_many_requests(alice: KeyProvider) -> None:
    with RawConnection(alice.port) as connection:
        for _ in range(20):
            assert connection.ask("/capabilities").status == 200
            assert connection.ask("/nothing").status == 404
            assert connection.ask("/key?remoteSystemID=").status == 400


def test_pipelined_requests_are_answered_in_order(alice: KeyProvider) -> None:
    targets = ["/capabilities", "/entropy?minentropy=8", "/nothing", f"/key?remoteSystemID={BOB}"]
    with RawConnection(alice.port) as connection:
        connection.send(b"".join(map(request_bytes, targets)))
        answers = [connection.read() for _ in targets]
    assert [answer.status for answer in answers] == [200, 200, 404, 200]
    assert answers[1].json["minentropy"] == 8


def test_http_1_0_without_a_host_is_served(alice: KeyProvider) -> None:
    with RawConnection(alice.port) as connection:
        connection.send(b"GET /capabilities HTTP/1.0\r\n\r\n")
        assert connection.read().json["localSystemID"] == ALICE
        assert connection.is_ended()


# --- the earlier server's pages


def test_health_has_the_earlier_servers_fields(alice: KeyProvider) -> None:
    answer = ask(alice, "/health")
    assert_json(answer)
    body = answer.json
    assert body["status"] in ("ok", "degraded")
    assert body["database"] == "ok"
    assert body["localSystemID"] == ALICE
    assert re.fullmatch(r"\d+\.\d+\.\d+.*|0\+unknown", body["version"])
    reported = datetime.fromisoformat(body["timestamp"])
    assert abs((datetime.now(UTC) - reported).total_seconds()) < 5


def test_sync_status_has_the_earlier_servers_fields(alice: KeyProvider) -> None:
    answer = ask(alice, "/status/sync")
    assert_json(answer)
    body = answer.json
    assert body["sync_enabled"] is True
    assert body["local_system_id"] == ALICE
    assert body["peer_count"] == 1
    peer = body["peers"][BOB]
    assert {"endpoint", "status", "last_heartbeat", "issued", "waiting", "retrieved", "expired"} <= set(peer)
    assert peer["status"] in ("online", "late", "offline")
    if peer["last_heartbeat"] is not None:
        assert abs(time.time() - peer["last_heartbeat"]) < 60
