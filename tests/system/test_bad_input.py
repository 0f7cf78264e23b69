"""What bad input gets: 400 with a JSON error that names the parameter, no 500, no stack trace, no change.

Every case is sent as raw bytes, since no client library would send most of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sandbox.client import get
from sandbox.key_provider import KeyProvider
from tests.system.harness import (
    ALICE,
    BOB,
    Lab,
    RawAnswer,
    RawConnection,
    Store,
    ask,
    count_records,
    key_target,
    log_lines,
    rows,
)
from tests.waiting import wait_for

CAROL = "KP_Carol"
LONG = "A" * 1900
ESCAPED_SQL = "KP_Bob%27%20OR%20%271%27%3D%271"
SQL_DROP = "KP_Bob%27%3B%20DROP%20TABLE%20key_records%3B--%20"
HTML = "%3Cscript%3Ealert(1)%3C%2Fscript%3E"

# What may stand for any value; raw bytes as they go over the wire.
HOSTILE_VALUES: dict[str, bytes] = {
    "empty": b"",
    "space": b"%20",
    "plus": b"+",
    "over-long": LONG.encode(),
    "escaped over-long": b"%41" * 600,
    "control character": b"KP_Bob%01",
    "line end": b"KP_Bob%0d%0aX-Evil:%201",
    "tab": b"KP_Bob%09",
    "delete": b"KP_Bob%7f",
    "zero": b"%00",
    "zero behind": b"KP_Bob%00",
    "zero before": b"%00KP_Bob",
    "sql": ESCAPED_SQL.encode(),
    "sql drop": SQL_DROP.encode(),
    "sql comment": b"KP_Bob%27--",
    "html": HTML.encode(),
    "up and away": b"../../etc/passwd",
    "escaped up and away": b"..%2f..%2fetc%2fpasswd",
    "utf-8": "KP_Bób".encode(),
    "escaped utf-8": b"KP_B%C3%B3b",
    "invalid utf-8": b"KP_Bob\xff\xfe",
    "escaped invalid utf-8": b"KP_Bob%ff%fe",
    "overlong utf-8": b"%c0%af",
    "surrogate": b"%ed%a0%80",
    "unfinished escape": b"KP_Bob%",
    "bad escape": b"KP_Bob%zz",
    "half an escape": b"KP_Bob%4",
    "escaped escape": b"KP_Bob%2500",
    "emoji": "🔑".encode(),
    "format string": b"%25s%25n{0}${jndi}",
    "json": b"{%22a%22:1}",
    "wildcard": b"*",
    "wildcard id": b"KP_%2A",
    "list": b"[A-Z]",
    "negative": b"-256",
    "float": b"256.0",
    "exponent": b"2e2",
    "hex number": b"0x100",
    "underscore": b"2_56",
    "not a number": b"NaN",
    "infinity": b"inf",
    "huge": b"9" * 400,
    "arabic digits": "٢٥٦".encode(),
    "fullwidth digits": b"\xef\xbc\x92\xef\xbc\x95\xef\xbc\x96",
    "space before": b"%20256",
    "space behind": b"256%20",
    "line behind": b"256%0a",
}
BAD_SIZES = [
    b"0",
    b"1",
    b"8",
    b"120",
    b"127",
    b"129",
    b"255",
    b"257",
    b"511",
    b"520",
    b"1024",
    b"0256",
    b"+256",
    b"true",
]
BAD_ENTROPIES = [b"0", b"1", b"7", b"9", b"4095", b"8191", b"8193", b"8200", b"65536", b"008", b"99999999999999"]
HOSTILE_KEY_IDS = {name: value for name, value in HOSTILE_VALUES.items() if name != "up and away"} | {
    "30 digits": b"a" * 30,
    "33 digits": b"a" * 33,
    "130 digits": b"a" * 130,
    "not hex": b"g" * 32,
    "hyphens": b"01234567-89ab-cdef-0123-456789abcdef",
    "line behind": b"a" * 32 + b"%0a",
    "zero behind": b"a" * 32 + b"%00",
    "path behind": b"a" * 32 + b"/",
    "fullwidth": b"\xef\xbd\x81" * 32,
    "parameters behind": b"a" * 32 + b";x=1",
    "two key ids": b"a" * 32 + b"," + b"b" * 32,
}


@pytest.fixture(scope="module")
def pair(shared_lab: Lab) -> tuple[KeyProvider, KeyProvider]:
    """Both may share keys with a third one too, so that its id is wrong without being unknown."""
    return shared_lab.add_pair(SKIP_REMOTE_SYSTEM_ID_2=CAROL)


@pytest.fixture(scope="module")
def store(shared_lab: Lab, pair: tuple[KeyProvider, KeyProvider]) -> Iterator[Store]:
    assert all(kp.is_healthy() for kp in pair)
    with shared_lab.database.connect() as connection:
        yield connection


@pytest.fixture(autouse=True)
def nothing_changes(store: Store) -> Iterator[None]:
    """No test here leaves another number of key records than it found."""
    before = count_records(store)
    yield
    assert count_records(store) == before


def rejected(kp: KeyProvider, target: bytes) -> RawAnswer:
    answer = ask(kp, target)
    assert answer.status == 400, f"{target[:100]!r} was answered {answer.status} {answer.body[:200]!r}"
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert set(answer.json) == {"error"}
    assert "Traceback" not in answer.error
    assert len(answer.error) < 300
    return answer


def refused_naming(kp: KeyProvider, parameter: str, target: bytes) -> None:
    answer = rejected(kp, target)
    # Bytes that HTTP itself does not allow in a request line are refused before there is a parameter.
    if any(byte >= 0x80 for byte in target) or len(target) > 2000:
        assert parameter in answer.error or "well-formed HTTP" in answer.error
    else:
        assert parameter in answer.error


@pytest.mark.parametrize("value", HOSTILE_VALUES.values(), ids=HOSTILE_VALUES)
@pytest.mark.parametrize("parameter", ["remoteSystemID", "remoteSystemId"])
def test_a_hostile_remote_system_id_is_400_when_a_key_is_issued(
    alice: KeyProvider, parameter: str, value: bytes
) -> None:
    refused_naming(alice, "remoteSystemID", b"/key?" + parameter.encode() + b"=" + value)


@pytest.mark.parametrize("value", HOSTILE_VALUES.values(), ids=HOSTILE_VALUES)
def test_a_hostile_remote_system_id_is_400_when_a_key_is_retrieved(bob: KeyProvider, value: bytes) -> None:
    refused_naming(bob, "remoteSystemID", b"/key/" + b"ab" * 16 + b"?remoteSystemID=" + value)


@pytest.mark.parametrize(
    "query",
    [
        b"",
        b"?",
        b"?remoteSystemID",
        b"?remoteSystemID=",
        b"?remotesystemid=KP_Bob",
        b"?size=256",
        b"?=KP_Bob",
        b"?remoteSystemID=KP_Bob&remoteSystemID=KP_Bob",
        b"?remoteSystemID=KP_Bob&remoteSystemId=KP_Bob",
        b"?remoteSystemID=KP_Bob&remoteSystemID=",
        b"?remoteSystemID[]=KP_Bob",
        b"?remoteSystemID=kp_bob",
        b"?remoteSystemID=KP_Bo",
        b"?remoteSystemID=KP_Bobb",
        b"?remoteSystemID=KP_Mallory",
        b"?remoteSystemID=KP_Alice",
        b"?remoteSystemID=KP_Bob,KP_Eve",
        b"?remoteSystemID=KP_Bob;size=256",
    ],
)
def test_a_missing_repeated_or_unknown_remote_system_id_is_400(alice: KeyProvider, query: bytes) -> None:
    refused_naming(alice, "remoteSystemID", b"/key" + query)


@pytest.mark.parametrize(
    "value", [*HOSTILE_VALUES.values(), *BAD_SIZES], ids=[*HOSTILE_VALUES, *map(bytes.decode, BAD_SIZES)]
)
def test_a_bad_size_is_400(alice: KeyProvider, value: bytes) -> None:
    refused_naming(alice, "size", b"/key?remoteSystemID=KP_Bob&size=" + value)


@pytest.mark.parametrize(
    "value", [*HOSTILE_VALUES.values(), *BAD_ENTROPIES], ids=[*HOSTILE_VALUES, *map(bytes.decode, BAD_ENTROPIES)]
)
def test_a_bad_minentropy_is_400(alice: KeyProvider, value: bytes) -> None:
    refused_naming(alice, "minentropy", b"/entropy?minentropy=" + value)


@pytest.mark.parametrize(
    ("path", "parameter"),
    [
        (b"/key?remoteSystemID=KP_Bob&size=256&size=256", "size"),
        (b"/key?remoteSystemID=KP_Bob&size=128&size=512", "size"),
        (b"/entropy?minentropy=8&minentropy=8", "minentropy"),
    ],
)
def test_a_repeated_size_or_minentropy_is_400(alice: KeyProvider, path: bytes, parameter: str) -> None:
    refused_naming(alice, parameter, path)


def test_a_query_with_thousands_of_fields_is_400(alice: KeyProvider) -> None:
    rejected(alice, b"/key?remoteSystemID=KP_Bob" + b"&a" * 900)
    rejected(alice, b"/key?remoteSystemID=KP_Bob" + b"&" * 1900)


@pytest.mark.parametrize("value", HOSTILE_KEY_IDS.values(), ids=HOSTILE_KEY_IDS)
def test_a_hostile_key_id_is_400(bob: KeyProvider, value: bytes) -> None:
    refused_naming(bob, "keyId", b"/key/" + value + b"?remoteSystemID=KP_Alice")


@pytest.mark.parametrize("path", [b"/key/../capabilities", b"/key/..%2fcapabilities", b"/key/%2e%2e/%2e%2e/etc/passwd"])
def test_no_path_walks_out_of_the_keys(bob: KeyProvider, path: bytes) -> None:
    answer = ask(bob, path + b"?remoteSystemID=KP_Alice")
    assert answer.status in (400, 404)
    assert set(answer.json) == {"error"}


def test_an_error_never_echoes_what_was_sent(alice: KeyProvider) -> None:
    for value in (b"%3Cscript%3Exyzzy", b"xyzzy", b"%01xyzzy", b"'xyzzy"):
        for target in (
            b"/key?remoteSystemID=" + value,
            b"/key?remoteSystemID=KP_Bob&size=" + value,
            b"/entropy?minentropy=" + value,
            b"/key/" + value + b"?remoteSystemID=KP_Bob",
        ):
            assert b"xyzzy" not in rejected(alice, target).body
        assert b"xyzzy" not in ask(alice, b"/" + value).body


def test_the_rightful_caller_gets_the_key_after_every_wrong_one(
    shared_lab: Lab, alice: KeyProvider, bob: KeyProvider
) -> None:
    key = shared_lab.issue(alice, BOB)
    with RawConnection(bob.port) as at_bob:
        for wrong in (
            b"KP_Carol",
            b"KP_Bob",
            b"KP_Mallory",
            b"",
            b"kp_alice",
            b"KP_Alice%00",
            b"KP_Alic%3F",
            b"*",
            b"KP_Alice'--",
        ):
            target = b"/key/%b?remoteSystemID=%b" % (key.key_id.encode(), wrong)
            assert at_bob.ask(target).status == 400
        assert at_bob.ask(f"/key/{key.key_id}").status == 400
        assert at_bob.ask(f"/key/{key.key_id}0?remoteSystemID={ALICE}").status == 400
        assert at_bob.ask(f"/key/{key.key_id[:-2]}?remoteSystemID={ALICE}").status == 400
        assert at_bob.ask(f"/key/{key.key_id}00?remoteSystemID={ALICE}").status == 400
        assert at_bob.ask(f"/key/00{key.key_id}?remoteSystemID={ALICE}").status == 400
    for remote in (BOB, ALICE, CAROL):
        # The source's own encryptor may not have it a second time, whatever it says.
        assert get(alice.url, "key", key.key_id, remoteSystemID=remote).status == 400
    shared_lab.assert_retrievable(key)


def test_a_refusal_does_not_tell_whether_the_key_is_there(shared_lab: Lab, alice: KeyProvider) -> None:
    key = shared_lab.issue(alice, BOB)
    there = ask(alice, key_target(key.key_id, remoteSystemID=BOB))
    nowhere = ask(alice, key_target("ab" * 16, remoteSystemID=BOB))
    assert (there.status, there.body) == (nowhere.status, nowhere.body)
    shared_lab.assert_retrievable(key)


def test_a_reason_of_a_refusal_stands_in_the_access_log(shared_lab: Lab, alice: KeyProvider, bob: KeyProvider) -> None:
    key = shared_lab.issue(alice, BOB)
    refused_id = ask(bob, key_target(key.key_id, remoteSystemID="KP_Mallory")).headers["x-request-id"]
    shared_lab.assert_retrievable(key)
    wait_for(lambda: refused_id in bob.log_of("api").read_text(), timeout_seconds=5)
    line = next(line for line in log_lines(bob, "api") if line.get("correlation_id") == refused_id)
    assert line["status"] == 400
    assert "remoteSystemID" in line["reason"]
    assert key.key_id not in str(line)


def test_hostile_ids_reached_no_table(shared_lab: Lab, alice: KeyProvider) -> None:
    for value in HOSTILE_VALUES.values():
        rejected(alice, b"/key?remoteSystemID=" + value)
    tables = rows(shared_lab.database, "SHOW TABLES")
    assert ("key_records",) in tables
    assert rows(shared_lab.database, "SELECT DISTINCT target_id FROM wrapping_keys WHERE source_id = %s", ALICE) in (
        ((BOB,),),
        (),
    )
