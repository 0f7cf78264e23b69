"""Clients that break HTTP, never finish, never read, or come in thousands: other clients do not notice.

Everything is over loopback and bounded in count and time. While an attack goes on, a witness (a normal client)
asks for capabilities, keys and their retrieval; all of its requests must succeed with sane latency.
"""

from __future__ import annotations

import re
import resource
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from sandbox.client import get
from sandbox.key_provider import KeyProvider
from sandbox.mariadb import MariaDbServer
from sandbox.ports import LOOPBACK
from sandbox.rabbitmq import RabbitMqServer
from tests.system.conftest import new_lab
from tests.system.harness import (
    ALICE,
    BOB,
    Lab,
    RawConnection,
    ask,
    in_background,
    request_bytes,
    rows,
)
from tests.waiting import wait_for

HEADER_TIMEOUT_SECONDS = 2
ENDED_SECONDS = HEADER_TIMEOUT_SECONDS + 3
ANSWER_TIMEOUT_SECONDS = 30
IDLE_CONNECTIONS = 10_000
FEW_CONNECTIONS = 20
# Those to the store, the listener, the event loop's own.
OTHER_SOCKETS = 15
# The machine is shared and small; what is held against this is a client that waits for an attacker's timeout.
SANE_SECONDS = 1.0
SANE_MEDIAN_SECONDS = 0.1

# A ClientHello as OpenSSL begins it.
TLS_HELLO = bytes.fromhex("16030102000100 01fc0303".replace(" ", "")) + bytes(508)


@pytest.fixture(scope="module")
def pair(shared_lab: Lab) -> tuple[KeyProvider, KeyProvider]:
    return shared_lab.add_pair(SKIP_HEADER_TIMEOUT_SECONDS=str(HEADER_TIMEOUT_SECONDS))


@pytest.fixture(autouse=True)
def api_survives(pair: tuple[KeyProvider, KeyProvider]) -> Iterator[None]:
    """No attack ends or restarts a process."""
    before = [child.pid for kp in pair for child in kp.processes.values()]
    yield
    assert [child.pid for kp in pair for child in kp.processes.values() if child.running] == before


class Witness:
    """A normal client, on a new connection for every request, as routers are."""

    def __init__(self, lab: Lab, source: KeyProvider, target: KeyProvider) -> None:
        self._lab = lab
        self._source = source
        self._target = target
        self.waits: list[tuple[float, str]] = []

    def run(self, stop: threading.Event) -> None:
        while not stop.wait(0.02):
            self._timed("capabilities")
            issued = self._timed("key", remoteSystemID=self._target.system_id)
            retrieved = get(self._target.url, "key", issued["keyId"], remoteSystemID=self._source.system_id)
            assert retrieved.body == issued

    def _timed(self, *path: str, **asked: str) -> dict[str, str]:
        started = time.monotonic()
        answer = get(self._source.url, *path, timeout_seconds=10, **asked)
        self.waits.append((time.monotonic() - started, path[0]))
        assert answer.status == 200, f"{path}: {answer.status} {answer.error}"
        return dict(answer.body)

    def assert_noticed_nothing(self) -> None:
        assert len(self.waits) >= 10
        ordered = sorted(self.waits)
        assert ordered[len(ordered) // 2] < (SANE_MEDIAN_SECONDS,)
        assert ordered[-1] < (SANE_SECONDS,), f"the longest waits: {ordered[-5:]}"


@contextmanager
def witness(lab: Lab, attacked: KeyProvider, other: KeyProvider) -> Iterator[Witness]:
    watching = Witness(lab, attacked, other)
    with in_background(watching.run):
        yield watching
        seen = len(watching.waits)
        wait_for(lambda: len(watching.waits) >= seen + 10, timeout_seconds=20)
    watching.assert_noticed_nothing()


def answers_until_end(port: int, data: bytes, timeout_seconds: float = ENDED_SECONDS) -> bytes:
    """All that comes back until the server ends the connection. Raises TimeoutError when it does not."""
    with socket.create_connection((LOOPBACK, port), timeout=timeout_seconds) as client:
        received = b""
        try:
            client.sendall(data)
            while piece := client.recv(65536):
                received += piece
        except (ConnectionError, BrokenPipeError):
            pass
        return received


# --- broken HTTP

MALFORMED: dict[str, bytes] = {
    "garbage": bytes(range(256)) * 4 + b"\r\n\r\n",
    "zeros": bytes(1000) + b"\r\n\r\n",
    "tls hello": TLS_HELLO,
    "http/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "ssh": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "amqp": b"AMQP\x00\x00\x09\x01\r\n\r\n",
    "no target": b"GET\r\n\r\n",
    "no version": b"GET /capabilities\r\n\r\n",
    "wrong version": b"GET /capabilities HTTP/9.9\r\n\r\n",
    "not http": b"GET /capabilities FTP/1.1\r\n\r\n",
    "space in target": b"GET /capa bilities HTTP/1.1\r\nHost: a\r\n\r\n",
    "zero in target": b"GET /capab\x00ilities HTTP/1.1\r\nHost: a\r\n\r\n",
    "zero in header": b"GET /capabilities HTTP/1.1\r\nHost: a\x00b\r\n\r\n",
    "zero in header name": b"GET /capabilities HTTP/1.1\r\nHo\x00st: a\r\n\r\n",
    "no colon": b"GET /capabilities HTTP/1.1\r\nHost\r\n\r\n",
    "space before colon": b"GET /capabilities HTTP/1.1\r\nHost : a\r\n\r\n",
    "empty header name": b"GET /capabilities HTTP/1.1\r\n: a\r\n\r\n",
    "long line": b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "long query": b"GET /key?remoteSystemID=" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "long method": b"G" * 9000 + b" / HTTP/1.1\r\nHost: a\r\n\r\n",
    "long header": b"GET /capabilities HTTP/1.1\r\nX: " + b"a" * 9000 + b"\r\n\r\n",
    "long header name": b"GET /capabilities HTTP/1.1\r\n" + b"a" * 9000 + b": x\r\n\r\n",
    "many headers": b"GET /capabilities HTTP/1.1\r\n" + b"X: y\r\n" * 500 + b"\r\n",
    "two lengths": b"GET /capabilities HTTP/1.1\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\n",
    "negative length": b"GET /capabilities HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    "plus length": b"GET /capabilities HTTP/1.1\r\nContent-Length: +5\r\n\r\n",
    "word as length": b"GET /capabilities HTTP/1.1\r\nContent-Length: many\r\n\r\n",
    "length and chunks": b"GET /capabilities HTTP/1.1\r\nContent-Length: 5\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bad chunk": b"GET /capabilities HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
    "unknown coding": b"GET /capabilities HTTP/1.1\r\nTransfer-Encoding: gzip, identity\r\n\r\n",
    "huge length": b"GET /capabilities HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
    "large body": b"GET /capabilities HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n" + b"a" * 100_000,
    "chunks without end": b"GET /capabilities HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"5\r\nabcde\r\n" * 10_000,
    "posted body": b"POST /key?remoteSystemID=KP_Bob HTTP/1.1\r\nContent-Length: 100000\r\n\r\n" + b"a" * 1000,
    "expectation": b"GET /capabilities HTTP/1.1\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n",
    "connect": b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\nConnection: close\r\n\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    "authority": b"GET example.org:443 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    "no slash": b"GET capabilities HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    "bad port in target": b"GET http://[::1/capabilities HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    "impossible port": b"GET http://a:99999999/capabilities HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    "scheme only": b"GET http:// HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_request_is_refused_and_its_connection_ended(alice: KeyProvider, data: bytes) -> None:
    received = answers_until_end(alice.port, data)
    assert received == b"" or re.match(rb"HTTP/\d\.\d 4", received), received[:200]
    assert b"Traceback" not in received
    if received:
        head, _, body = received.partition(b"\r\n\r\n")
        assert b"application/json" in head
        assert body == b"" or body.startswith(b'{"error":')
    assert ask(alice, "/capabilities").status == 200


@pytest.mark.parametrize("name", ["tls hello", "garbage", "long line", "many headers", "wrong version", "two lengths"])
def test_broken_http_is_told_so_in_json(alice: KeyProvider, name: str) -> None:
    received = answers_until_end(alice.port, MALFORMED[name])
    assert received.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
    assert b"well-formed HTTP" in received


SMUGGLED = b"GET /key?remoteSystemID=KP_Bob HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: %d\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n",
        b"Transfer-Encoding : chunked\r\nContent-Length: %d\r\n\r\n",
        b"Transfer-Encoding: xchunked\r\nContent-Length: %d\r\n\r\n",
    ],
)
def test_no_request_is_smuggled_in_a_body(alice: KeyProvider, head: bytes) -> None:
    head = head % len(SMUGGLED) if b"%d" in head else head
    data = b"GET /capabilities HTTP/1.1\r\nHost: a\r\n" + head + SMUGGLED
    received = answers_until_end(alice.port, data)
    assert received.count(b"HTTP/1.1 ") <= 1
    assert b"keyId" not in received


def test_thousands_of_broken_requests_harm_nobody(shared_lab: Lab, alice: KeyProvider, bob: KeyProvider) -> None:
    broken = [MALFORMED[name] for name in ("garbage", "tls hello", "long line", "two lengths", "bad chunk")]
    with witness(shared_lab, alice, bob):
        for number in range(1000):
            with socket.create_connection((LOOPBACK, alice.port), timeout=5) as client:
                client.sendall(broken[number % len(broken)])
                if number % 3 == 0:
                    # A reset instead of an end, in the middle of whatever the server does.
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# --- requests that never end


@pytest.mark.parametrize(
    ("start", "drop"),
    [
        (b"", b"G"),
        (b"GET /", b"a"),
        (b"GET /capabilities HTTP/1.1\r\n", b"X-A: b\r\n"),
        (b"GET /capabilities HTTP/1.1\r\nHost: a\r\nX: ", b"y"),
        (b"\r\n", b"\r\n"),
    ],
    ids=["method", "request line", "headers", "one header", "empty lines"],
)
def test_a_request_that_never_ends_is_cut_and_nobody_notices(
    shared_lab: Lab, alice: KeyProvider, bob: KeyProvider, start: bytes, drop: bytes
) -> None:
    with ExitStack() as at_end:
        slow = [at_end.enter_context(RawConnection(alice.port)) for _ in range(50)]
        for connection in slow:
            connection.send(start)
        with witness(shared_lab, alice, bob):
            wait_for(lambda: all_cut(slow, drop), timeout_seconds=ENDED_SECONDS)


def test_a_second_request_that_never_ends_is_cut_as_soon_as_a_first_one(alice: KeyProvider) -> None:
    with RawConnection(alice.port) as client:
        assert client.ask("/capabilities").status == 200
        client.send(b"GET /capab")
        wait_for(lambda: was_cut(client, b"i"), timeout_seconds=ENDED_SECONDS)


def test_a_connection_that_is_idle_after_an_answer_is_not_cut(alice: KeyProvider) -> None:
    with RawConnection(alice.port) as client:
        for _ in range(2):
            assert client.ask("/capabilities").status == 200
            time.sleep(HEADER_TIMEOUT_SECONDS + 2)
        assert client.ask("/capabilities").status == 200


def all_cut(connections: list[RawConnection], drop: bytes) -> bool:
    """Drips some more on every connection; whether the server has ended all of them."""
    cut = [was_cut(connection, drop) for connection in connections]
    return all(cut)


def was_cut(connection: RawConnection, drop: bytes) -> bool:
    client = connection.socket
    try:
        client.setblocking(False)
        client.send(drop)
        return client.recv(65536) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_a_body_that_never_ends_is_cut_and_nobody_notices(
    shared_lab: Lab, alice: KeyProvider, bob: KeyProvider
) -> None:
    heads = [
        b"GET /capabilities HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n",
        b"POST /sync HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n",
        b"GET /key?remoteSystemID=KP_Bob HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
    ]
    before = rows(shared_lab.database, "SELECT COUNT(*) FROM key_records")
    with ExitStack() as at_end:
        slow = [at_end.enter_context(RawConnection(alice.port)) for _ in range(51)]
        for number, connection in enumerate(slow):
            connection.send(heads[number % 3])
        wait_for(lambda: all_cut(slow, b"5\r\n"), timeout_seconds=ENDED_SECONDS)
    assert rows(shared_lab.database, "SELECT COUNT(*) FROM key_records") == before
    with witness(shared_lab, alice, bob):
        pass


# --- clients that do not read


class Deaf:
    """Connections that ask thousands of times and never read an answer."""

    def __init__(self, port: int, count: int) -> None:
        self.started = time.monotonic()
        self._port = port
        self.sockets = list[socket.socket]()
        for _ in range(count):
            self.add()

    def add(self) -> None:
        client = socket.create_connection((LOOPBACK, self._port), timeout=5)
        self.sockets.append(client)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        self.ask_more(client)

    def ask_more(self, client: socket.socket) -> None:
        # One that was given up already learns so here, one whose requests are not taken is full.
        with suppress(OSError):
            client.send(request_bytes("/entropy?minentropy=8192") * 5000)

    def ended(self) -> int:
        """How many of the connections the server has given up."""
        poll = select.poll()
        for client in self.sockets:
            poll.register(client, select.POLLHUP | select.POLLERR)
        return len(poll.poll(0))

    def close(self) -> None:
        for client in self.sockets:
            client.close()


@pytest.fixture(scope="module")
def deaf(alice: KeyProvider) -> Iterator[Deaf]:
    clients = Deaf(alice.port, 20)
    yield clients
    clients.close()


def test_clients_that_do_not_read_cost_little_and_nobody_notices(
    shared_lab: Lab, alice: KeyProvider, bob: KeyProvider, deaf: Deaf
) -> None:
    before = resident_mib(alice)
    with witness(shared_lab, alice, bob):
        time.sleep(2)
        for client in deaf.sockets:
            deaf.ask_more(client)
        time.sleep(1)
    assert resident_mib(alice) < before + 50


def resident_mib(kp: KeyProvider) -> float:
    status = Path(f"/proc/{kp.processes['api'].pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


# --- crowds


def test_ten_thousand_idle_connections_harm_nobody(shared_lab: Lab, alice: KeyProvider, bob: KeyProvider) -> None:
    allow_files(IDLE_CONNECTIONS + 1000)
    with ExitStack() as at_end:
        with witness(shared_lab, alice, bob) as watching:
            idle = [
                at_end.enter_context(socket.create_connection((LOOPBACK, alice.port), timeout=10))
                for _ in range(IDLE_CONNECTIONS)
            ]
            wait_for(lambda: open_connections(alice) >= IDLE_CONNECTIONS, timeout_seconds=20)
            watching.waits.clear()
        assert resident_mib(alice) < 500
        # One of them wakes up.
        idle[0].sendall(request_bytes("/capabilities"))
        assert idle[0].recv(100).startswith(b"HTTP/1.1 200")
    wait_for(lambda: open_connections(alice) < 100, timeout_seconds=20)


def allow_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard == resource.RLIM_INFINITY or hard >= count, f"this test needs `ulimit -Hn` of {count} or more"
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def open_connections(kp: KeyProvider) -> int:
    """Established connections that the api process holds."""
    sockets = 0
    for descriptor in Path(f"/proc/{kp.processes['api'].pid}/fd").iterdir():
        try:
            sockets += str(descriptor.readlink()).startswith("socket:")
        except OSError:
            continue
    return sockets


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, mariadb: MariaDbServer, rabbitmq: RabbitMqServer) -> Iterator[Lab]:
    """A pair that takes few connections and lets few callers wait."""
    with new_lab(tmp_path_factory.mktemp("narrow"), mariadb, rabbitmq) as lab:
        lab.add_pair(SKIP_MAX_CONNECTIONS=str(FEW_CONNECTIONS), SKIP_MAX_QUEUE="2", SKIP_MAX_BATCH="2")
        yield lab


def test_connections_over_the_limit_push_out_the_oldest_idle_ones(narrow: Lab) -> None:
    alice, bob = narrow.kps[ALICE], narrow.kps[BOB]
    with ExitStack() as at_end, witness(narrow, alice, bob):
        idle = [at_end.enter_context(RawConnection(alice.port, 1)) for _ in range(4 * FEW_CONNECTIONS)]
        wait_for(lambda: open_connections(alice) < FEW_CONNECTIONS + OTHER_SOCKETS, timeout_seconds=10)
        assert idle[0].is_ended()
        assert idle[FEW_CONNECTIONS].is_ended()
        assert idle[-1].ask("/capabilities").status == 200
    wait_for(lambda: "connections evicted" in alice.log_of("api").read_text(), timeout_seconds=5)


def test_busy_connections_do_not_break_the_limit_either(narrow: Lab) -> None:
    alice, bob = narrow.kps[ALICE], narrow.kps[BOB]
    clients = Deaf(alice.port, 0)
    try:
        for _ in range(2 * FEW_CONNECTIONS):
            clients.add()
            # It is busy when the next one comes: none of them is idle.
            time.sleep(0.1)
        assert open_connections(alice) < FEW_CONNECTIONS + OTHER_SOCKETS
        with witness(narrow, alice, bob):
            pass
    finally:
        clients.close()


def test_more_callers_than_may_wait_are_told_to_come_back(narrow: Lab) -> None:
    alice = narrow.kps[ALICE]
    with ExitStack() as at_end:
        callers = [at_end.enter_context(RawConnection(alice.port, 20)) for _ in range(FEW_CONNECTIONS - 2)]
        for caller in callers:
            caller.send(request_bytes(f"/key?remoteSystemID={BOB}"))
        answers = [caller.read() for caller in callers]
    refused = [answer for answer in answers if answer.status == 503]
    assert {answer.status for answer in answers} == {200, 503}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert narrow.issue(alice, BOB).source == ALICE


def test_connections_that_come_and_go_leave_nothing_behind(
    shared_lab: Lab, alice: KeyProvider, bob: KeyProvider
) -> None:
    before = open_connections(alice)
    with witness(shared_lab, alice, bob):
        for number in range(2000):
            with socket.create_connection((LOOPBACK, alice.port), timeout=5) as client:
                if number % 2:
                    client.sendall(request_bytes("/capabilities"))
    wait_for(lambda: open_connections(alice) <= before + 5, timeout_seconds=10)


def test_many_callers_at_once_are_all_answered(alice: KeyProvider) -> None:
    with ExitStack() as at_end:
        callers = [at_end.enter_context(RawConnection(alice.port, 20)) for _ in range(500)]
        for caller in callers:
            caller.send(request_bytes(f"/key?remoteSystemID={BOB}"))
        statuses = {caller.read().status for caller in callers}
    assert statuses == {200}


def test_clients_that_do_not_read_are_given_up_in_the_end(deaf: Deaf) -> None:
    """The last test of this module: the connections were opened by an earlier one."""
    left_seconds = max(0.0, deaf.started + ANSWER_TIMEOUT_SECONDS - time.monotonic())
    # First they are answered until the kernel takes no more: tens of thousands of answers for all of them.
    filled_seconds = 30
    wait_for(lambda: deaf.ended() == len(deaf.sockets), timeout_seconds=left_seconds + filled_seconds, poll_seconds=0.5)
