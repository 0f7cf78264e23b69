"""Facts about ``POST /sync``, with KP_Alice's api running and her syncer's queue in the test's hands."""

from __future__ import annotations

import gzip
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sandbox.mariadb import MariaDbServer
from sandbox.rabbitmq import RabbitMqServer
from sandbox.simulated_peer import SimulatedPeer
from skipbus.shared.broker.names import live_routing_key, queue_name, routing_key
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.identity import CONTEXT_ENVELOPE, Identity
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import MAX_ENVELOPE_BYTES, EnvelopeType
from skipbus.shared.protocol.payloads import pack_rejection
from tests.system.conftest import new_lab
from tests.system.harness import ALICE, RawAnswer, RawConnection, ask, log_lines
from tests.system.stub_link import CAROL, StubLink
from tests.waiting import wait_for

QUEUE, LIVE = queue_name(ALICE), "test-live-of-alice"
BODY_TIMEOUT_SECONDS = 2.0


@pytest.fixture(scope="module")
def link(
    tmp_path_factory: pytest.TempPathFactory, mariadb: MariaDbServer, rabbitmq: RabbitMqServer
) -> Iterator[StubLink]:
    with new_lab(tmp_path_factory.mktemp("link"), mariadb, rabbitmq) as lab:
        made = StubLink(lab, SKIP_HEADER_TIMEOUT_SECONDS=str(BODY_TIMEOUT_SECONDS))
        made.start()
        yield made
        made.close()


@pytest.fixture
def queue(link: StubLink) -> Iterator[str]:
    """Alice's own queue, empty."""
    for name, key in ((QUEUE, routing_key(ALICE)), (LIVE, live_routing_key(ALICE))):
        # An earlier test's syncer may have left its own.
        link.admin.delete_queue(name)
        link.admin.make_queue(name, key)
    yield QUEUE
    for name in (QUEUE, LIVE):
        link.admin.delete_queue(name)


def head(length: int | None = None, *, method: str = "POST", path: str = "/sync", more: str = "") -> bytes:
    said = "" if length is None else f"Content-Length: {length}\r\n"
    return f"{method} {path} HTTP/1.1\r\nHost: kp.example\r\n{said}{more}\r\n".encode()


def post(link: StubLink, body: bytes, more: str = "") -> RawAnswer:
    with RawConnection(link.alice.port) as connection:
        connection.send(head(len(body), more=more) + body)
        return connection.read()


def unsigned(version: int = 1, kind: str = "key.stored", sender: str = CAROL, target: str = ALICE) -> bytes:
    protected = encoding.pack([version, kind, sender, target, 1, now_ms()])
    return encoding.pack([protected, b"\x90", b"s" * 4627])


# Taken in


def test_an_envelope_is_accepted_once_the_broker_has_it_as_it_came(link: StubLink, queue: str) -> None:
    body = link.carol.key_retrieved(ALICE)
    answer = post(link, body)
    assert (answer.status, answer.json) == (202, {"status": "accepted"})
    assert link.admin.take(queue) == body


def test_what_only_says_how_things_are_goes_to_whoever_listens_and_is_not_kept(link: StubLink, queue: str) -> None:
    rejection = link.carol.sign(ALICE, EnvelopeType.ENVELOPE_REFUSED, pack_rejection(7, "too_old", "it is old"))
    bodies = [link.carol.heartbeat(ALICE), link.carol.capabilities(ALICE), rejection]
    assert [post(link, body).status for body in bodies] == [202, 202, 202]
    assert [link.admin.take(LIVE) for _ in bodies] == bodies
    assert link.admin.depth(queue) == 0
    link.admin.delete_queue(LIVE)
    assert post(link, bodies[0]).status == 202


def test_dates_are_left_to_the_syncer_which_keeps_what_they_say_of_the_clock(link: StubLink, queue: str) -> None:
    body = link.carol.sign(ALICE, EnvelopeType.KEY_STORED, encoding.pack([1]), age_ms=-90_000)
    assert post(link, body).status == 202
    assert link.admin.take(queue) == body


def test_envelopes_follow_one_another_on_one_connection_however_their_bodies_come(link: StubLink, queue: str) -> None:
    bodies = [link.carol.key_retrieved(ALICE) for _ in range(3)]
    with RawConnection(link.alice.port) as connection:
        for body in bodies:
            connection.send(head(len(body)))
            for start in range(0, len(body), 2000):
                connection.send(body[start : start + 2000])
                time.sleep(0.05)
            assert connection.read().status == 202
        # The parts of the last body are not taken for a request that never ends.
        time.sleep(BODY_TIMEOUT_SECONDS + 2)
        connection.send(head(len(bodies[0])) + bodies[0])
        assert connection.read().status == 202
    assert [link.admin.take(queue) for _ in range(4)] == [*bodies, bodies[0]]


def test_a_body_comes_in_chunks_or_after_a_100_continue_as_well(link: StubLink, queue: str) -> None:
    body = link.carol.key_retrieved(ALICE)
    with RawConnection(link.alice.port) as connection:
        connection.send(head(more="Transfer-Encoding: chunked\r\n"))
        for start in range(0, len(body), 1000):
            piece = body[start : start + 1000]
            connection.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        connection.send(b"0\r\n\r\n")
        assert connection.read().status == 202
        connection.send(head(len(body), more="Expect: 100-continue\r\n"))
        assert connection.read().status == 100
        connection.send(body)
        assert connection.read().status == 202
    assert [link.admin.take(queue) for _ in range(2)] == [body, body]


# Refused


def test_without_a_queue_it_is_to_be_sent_again(link: StubLink) -> None:
    link.admin.delete_queue(QUEUE)
    answer = post(link, link.carol.key_retrieved(ALICE))
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert "send it again" in answer.error


@dataclass(frozen=True)
class Bad:
    """A body, and what is said of it."""

    body: bytes
    status: int
    reason: str


STRANGER = SimulatedPeer("KP_Stranger")
BAD = {
    "empty": Bad(b"", 400, "malformed"),
    "json": Bad(b'{"type": "heartbeat"}', 400, "malformed"),
    "an envelope of texts": Bad(encoding.pack(["a", "b", "c"]), 400, "malformed"),
    "an unknown version": Bad(unsigned(version=2), 400, "unknown_version"),
    "an unknown version of a stranger": Bad(unsigned(version=2, sender="KP_X"), 400, "unknown_version"),
    "an unknown type": Bad(unsigned(kind="key.stolen"), 400, "unknown_type"),
    "a stranger's": Bad(STRANGER.key_retrieved(ALICE), 401, "unknown_sender"),
    "unsigned": Bad(unsigned(), 401, "bad_signature"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_what_is_no_envelope_of_a_peer_is_refused_with_the_reason(link: StubLink, queue: str, bad: Bad) -> None:
    answer = post(link, bad.body)
    assert (answer.status, answer.json["reason"]) == (bad.status, bad.reason)
    assert answer.error
    assert ("versions" in answer.json) == (bad.reason == "unknown_version")
    assert link.admin.depth(queue) == 0


def test_a_foreign_signature_a_changed_byte_and_another_target_are_refused(link: StubLink, queue: str) -> None:
    body = link.carol.key_retrieved(ALICE)
    events = encoding.pack([[b"k" * 16, now_ms(), "c"]])
    foreign = link.carol.sign(ALICE, EnvelopeType.KEY_RETRIEVED, events, signer=Identity.generate())
    assert post(link, foreign).json["reason"] == "bad_signature"
    assert post(link, body[:-1] + bytes([body[-1] ^ 1])).json["reason"] == "bad_signature"
    assert post(link, link.carol.key_retrieved("KP_Bob")).json["reason"] == "wrong_target"
    assert post(link, body[:-1]).json["reason"] == "malformed"
    assert post(link, body + b"x").json["reason"] == "malformed"
    assert post(link, gzip.compress(body), more="Content-Encoding: gzip\r\n").json["reason"] == "malformed"
    assert link.admin.depth(queue) == 0
    # One that was signed for another purpose is not one either.
    protected, payload, _ = encoding.unpack(body)
    stolen = link.carol.identity.sign(protected + payload, CONTEXT_ENVELOPE)
    assert post(link, encoding.pack([protected, payload, stolen])).json["reason"] == "bad_signature"


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH"])
def test_sync_is_post_only_and_everything_else_is_not(link: StubLink, method: str) -> None:
    answer = ask(link.alice, "/sync", method=method)
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    for path in ("/key", "/capabilities", "/entropy", "/status/sync", "/key/00"):
        other = ask(link.alice, path, method="POST")
        assert (other.status, other.headers["allow"]) == (405, "GET")


def test_what_is_too_large_is_refused_by_its_length_before_it_is_sent_and_while_it_comes(link: StubLink) -> None:
    with RawConnection(link.alice.port) as connection:
        connection.send(head(MAX_ENVELOPE_BYTES + 1, more="Expect: 100-continue\r\n"))
        assert connection.read().status == 413
    answer = post(link, bytes(MAX_ENVELOPE_BYTES + 1))
    assert (answer.status, answer.json["reason"]) == (413, "too_large")
    with RawConnection(link.alice.port) as connection:
        connection.send(head(more="Transfer-Encoding: chunked\r\n"))
        for _ in range(MAX_ENVELOPE_BYTES // 65536 + 1):
            connection.send(b"10000\r\n" + bytes(65536) + b"\r\n")
        assert connection.read().status == 413
    assert post(link, bytes(MAX_ENVELOPE_BYTES)).status == 400


def test_a_body_that_never_ends_is_given_up(link: StubLink) -> None:
    with RawConnection(link.alice.port) as connection:
        connection.send(head(100) + b"half")
        started = time.monotonic()
        assert connection.read().status == 408
        assert time.monotonic() - started < BODY_TIMEOUT_SECONDS + 2
        assert connection.is_ended()


def test_hundreds_of_bodies_that_do_not_end_keep_no_envelope_of_a_peer_out(link: StubLink, queue: str) -> None:
    stuck = [socket.create_connection(("127.0.0.1", link.alice.port)) for _ in range(300)]
    try:
        for one in stuck:
            one.sendall(head(MAX_ENVELOPE_BYTES) + bytes(4096))
        assert post(link, link.carol.key_retrieved(ALICE)).status == 202
        assert ask(link.alice, "/capabilities").status == 200
    finally:
        for one in stuck:
            one.close()


def test_one_address_cannot_fill_the_memory_and_is_served_again_afterwards(link: StubLink, queue: str) -> None:
    large = bytes(MAX_ENVELOPE_BYTES - 10)
    connections = [RawConnection(link.alice.port) for _ in range(8)]
    try:

        def send(connection: RawConnection) -> int | None:
            try:
                connection.send(head(MAX_ENVELOPE_BYTES) + large)
                return connection.read().status
            except ConnectionError:
                # Refused, and too slow on this machine to read it: no server reads for a refused client for ever.
                return None

        with ThreadPoolExecutor(8) as senders:
            statuses = list(senders.map(send, connections))
    finally:
        for connection in connections:
            connection.close()
    # As many as have room wait for their end until they are given up.
    assert {408, 503} <= set(statuses) <= {408, 503, None}
    assert statuses.count(408) <= 4
    assert post(link, link.carol.key_retrieved(ALICE)).status == 202


def lines_of_sync(link: StubLink) -> list[dict[str, Any]]:
    return [line for line in log_lines(link.alice, "api") if line.get("path") == "/sync"]


def test_the_log_says_which_peer_sent_what_and_name_no_stranger(link: StubLink, queue: str) -> None:
    # A line is written just after its answer.
    time.sleep(0.5)
    before = len(lines_of_sync(link))
    for body in (link.carol.key_retrieved(ALICE), unsigned(), STRANGER.key_retrieved(ALICE)):
        post(link, body)
    wait_for(lambda: len(lines_of_sync(link)) == before + 3, timeout_seconds=10)
    lines = lines_of_sync(link)[before:]
    assert [line["status"] for line in lines] == [202, 401, 401]
    assert [line.get("remote_system_id") for line in lines] == [CAROL, CAROL, None]
    assert [line.get("reason", "").partition(" ")[0] for line in lines] == ["", "an", "the"]


def test_a_key_provider_without_bus_peers_refuses_whatever_it_is_sent(
    link: StubLink, tmp_path: Path, mariadb: MariaDbServer, rabbitmq: RabbitMqServer
) -> None:
    with new_lab(tmp_path, mariadb, rabbitmq) as lab:
        alice = lab.add(ALICE, CAROL)
        alice.make_files()
        alice.start("api")
        alice.start("janitor")
        alice.wait_healthy(60)
        for body in (link.carol.key_retrieved(ALICE), b"", b"no envelope", bytes(MAX_ENVELOPE_BYTES + 1)):
            with RawConnection(alice.port) as connection:
                connection.send(head(len(body)) + body)
                answer = connection.read()
            assert (answer.status, answer.json["reason"]) == (401, "unknown_sender")
        with RawConnection(alice.port) as connection:
            started = time.monotonic()
            connection.send(head(100, more="Expect: 100-continue\r\n"))
            assert connection.read().status == 401
            assert time.monotonic() - started < 1
        answer = ask(alice, "/sync")
        assert (answer.status, answer.headers["allow"]) == (405, "POST")
        assert alice.is_healthy()
