"""Facts about a line to the store whose other end is in the test's hands: nothing blocks, everybody is told."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from skipbus.shared.errors import StoreRefused, StoreUnavailable
from skipbus.shared.store.engine import STATEMENT_TIMEOUT_SECONDS
from skipbus.shared.store.line import StoreLine
from skipbus.shared.store.results import Rows
from skipbus.shared.store.steps import Command, Statement, octets
from tests.unit.test_results import MORE, end, error, ok, packets, row

COMMIT = Statement("INSERT;INSERT;COMMIT")


class Rig:
    """A line and the server's end of it."""

    def __init__(self, *, outlives_refusals: bool = False) -> None:
        ours, self.server = socket.socketpair()
        self.server.settimeout(5)
        self.loop = asyncio.get_running_loop()
        connection = SimpleNamespace(_sock=ours, _force_close=ours.close)
        self.line = StoreLine(cast("Any", connection), self.loop, outlives_refusals=outlives_refusals)

    def ask(self, statement: Statement = COMMIT) -> asyncio.Future[Rows]:
        answer: asyncio.Future[Rows] = self.loop.create_future()

        def told(rows: Rows, failure: BaseException | None) -> None:
            # A second call would raise InvalidStateError here.
            if failure is None:
                answer.set_result(rows)
            else:
                answer.set_exception(failure)

        self.line.send(statement, told)
        return answer


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    yield made
    made.line.close()
    made.server.close()


async def told(answer: asyncio.Future[Rows]) -> Rows:
    async with asyncio.timeout(5):
        return await answer


async def test_statements_go_out_as_one_query_and_the_answer_comes_back(rig: Rig) -> None:
    answer = rig.ask()
    assert rig.server.recv(100) == b"\x15\0\0\0\3INSERT;INSERT;COMMIT"
    rig.server.sendall(packets(ok(MORE), ok(MORE), ok()))
    assert await told(answer) == []
    assert rig.line.open


async def test_what_is_to_be_done_meanwhile_is_done_when_the_statement_has_gone(rig: Rig) -> None:
    seen: list[bytes] = []
    answer = rig.ask(Statement("COMMIT", meanwhile=lambda: seen.append(rig.server.recv(100))))
    assert seen == [b"\x07\0\0\0\3COMMIT"]
    rig.server.sendall(packets(ok()))
    assert await told(answer) == []
    assert len(seen) == 1


async def test_what_is_made_meanwhile_leaves_before_the_first_packet_is_answered(rig: Rig) -> None:
    seen: list[bytes] = []

    def more() -> list[Command]:
        seen.append(rig.server.recv(100))
        return ["INSERT;INSERT", "COMMIT"]

    for _ in range(2):
        answer = rig.ask(Statement("INSERT", meanwhile=more))
        assert seen.pop() == b"\x07\0\0\0\3INSERT"
        assert rig.server.recv(100) == b"\x0e\0\0\0\3INSERT;INSERT\x07\0\0\0\3COMMIT"
        rig.server.sendall(packets(ok()))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not answer.done()
        rig.server.sendall(packets(ok(MORE), ok()) + packets(ok()))
        assert await told(answer) == []
    assert rig.line.open


async def test_where_the_first_packet_is_refused_that_is_told_and_the_line_ends(rig: Rig) -> None:
    answer = rig.ask(Statement("INSERT", meanwhile=lambda: ["INSERT;COMMIT"]))
    rig.server.sendall(packets(error(1062, b"duplicate")) + packets(error(1048, b"null")))
    with pytest.raises(StoreRefused, match="1062"):
        await told(answer)
    assert not rig.line.open


async def test_where_the_first_packet_cannot_leave_nothing_more_is_made(rig: Rig) -> None:
    made: list[str] = []

    def more() -> list[Command]:
        made.append("more")
        return ["COMMIT"]

    rig.server.close()
    with pytest.raises(StoreUnavailable):
        await told(rig.ask(Statement("INSERT", meanwhile=more)))
    assert made == []


async def test_a_second_packet_waits_behind_the_first_one_that_the_server_does_not_take_at_once(rig: Rig) -> None:
    answer = rig.ask(Statement("x" * 2**21, meanwhile=lambda: ["COMMIT"]))
    received = b""
    while len(received) < 2**21 + 5 + 11:
        await asyncio.sleep(0.001)
        received += rig.server.recv(2**20)
    assert received[2**21 + 5 :] == b"\x07\0\0\0\3COMMIT"
    rig.server.sendall(packets(ok()) + packets(ok()))
    assert await told(answer) == []


async def test_one_line_serves_rows_and_commits_in_turn(rig: Rig) -> None:
    for _ in range(3):
        answer = rig.ask(Statement("SELECT", (octets,)))
        rig.server.sendall(packets(b"\1", b"column", end(), row(b"v"), end()))
        assert await told(answer) == [(b"v",)]
        answer = rig.ask()
        rig.server.sendall(packets(ok(MORE), ok(MORE), ok()))
        assert await told(answer) == []


async def test_an_answer_that_comes_octet_by_octet_is_read(rig: Rig) -> None:
    answer = rig.ask()
    for octet in packets(ok(MORE), ok(MORE), ok()):
        await asyncio.sleep(0)
        rig.server.send(bytes([octet]))
    assert await told(answer) == []


async def test_statements_that_the_server_does_not_take_at_once_block_nobody(rig: Rig) -> None:
    statement = Statement("x" * (2**24 + 100))
    started = time.monotonic()
    answer = rig.ask(statement)
    assert time.monotonic() - started < 1
    received = b""
    while len(received) < 2**24 + 100 + 9:
        await asyncio.sleep(0.001)
        received += rig.server.recv(2**20)
    # The greatest packet, and what is left of it in the next one.
    assert received[:5] == b"\xff\xff\xff\0\3"
    assert received[2**24 + 3 :][:4] == b"\x66\0\0\1"
    rig.server.sendall(packets(ok()))
    assert await told(answer) == []


@pytest.mark.parametrize("sent", [b"", packets(ok(MORE)), packets(ok(MORE), ok(MORE))[:-3]])
async def test_a_server_that_goes_in_the_middle_is_told_of_at_once(rig: Rig, sent: bytes) -> None:
    answer = rig.ask()
    rig.server.recv(100)
    rig.server.sendall(sent)
    rig.server.close()
    with pytest.raises(StoreUnavailable):
        await told(answer)
    assert not rig.line.open


@pytest.mark.parametrize("sent", [b"", packets(ok(MORE))[:6]])
async def test_a_server_that_stalls_is_given_up_in_time_and_not_before(rig: Rig, sent: bytes) -> None:
    answer = rig.ask()
    rig.server.sendall(sent)
    now = rig.loop.time()
    rig.line.check(now + STATEMENT_TIMEOUT_SECONDS - 1)
    assert rig.line.open
    rig.line.check(now + STATEMENT_TIMEOUT_SECONDS + 1)
    with pytest.raises(StoreUnavailable):
        await told(answer)
    assert not rig.line.open


async def test_a_server_that_takes_nothing_is_given_up_in_time(rig: Rig) -> None:
    answer = rig.ask(Statement("x" * 2**24))
    rig.line.check(rig.loop.time() + STATEMENT_TIMEOUT_SECONDS + 1)
    with pytest.raises(StoreUnavailable):
        await told(answer)


@pytest.mark.parametrize(("code", "kind"), [(1213, StoreUnavailable), (1062, StoreRefused)])
async def test_errors_of_the_server_become_ours(rig: Rig, code: int, kind: type[Exception]) -> None:
    answer = rig.ask()
    rig.server.sendall(packets(ok(MORE), error(code, b"x" * 40)))
    with pytest.raises(kind):
        await told(answer)
    assert not rig.line.open


async def test_a_line_may_outlive_a_refusal() -> None:
    rig = Rig(outlives_refusals=True)
    answer = rig.ask()
    rig.server.sendall(packets(ok(MORE), error(1062, b"duplicate")))
    with pytest.raises(StoreRefused, match="1062"):
        await told(answer)
    assert rig.line.open
    answer = rig.ask(Statement("ROLLBACK"))
    rig.server.sendall(packets(ok()))
    assert await told(answer) == []
    rig.line.close()
    rig.server.close()


@pytest.mark.parametrize(
    ("more", "code", "kind"), [(["COMMIT"], 1062, StoreRefused), (None, 1927, StoreUnavailable)], ids=["two", "killed"]
)
async def test_a_line_ends_where_more_may_be_on_its_way_or_the_server_is_away(
    more: list[Command] | None, code: int, kind: type[Exception]
) -> None:
    rig = Rig(outlives_refusals=True)
    answer = rig.ask(Statement("INSERT", meanwhile=lambda: more))
    rig.server.sendall(packets(error(code, b"no")))
    with pytest.raises(kind):
        await told(answer)
    assert not rig.line.open
    rig.server.close()


async def test_a_line_that_the_server_ends_while_nothing_is_asked_says_so(rig: Rig) -> None:
    rig.server.sendall(packets(error(4031, b"The client was disconnected by the server because of inactivity.")))
    rig.server.close()
    await asyncio.sleep(0.05)
    assert not rig.line.open
    with pytest.raises(StoreUnavailable):
        await told(rig.ask())


async def test_a_line_says_goodbye_when_nothing_is_under_way(rig: Rig) -> None:
    rig.line.close()
    rig.line.close()
    assert rig.server.recv(100) == b"\x01\0\0\0\x01"
    assert rig.server.recv(100) == b""


async def test_a_line_with_tls_reads_an_answer_of_many_records_and_a_late_one(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    server, client = tls_contexts(tmp_path)
    shaken = asyncio.create_task(asyncio.to_thread(server.wrap_socket, theirs, server_side=True))
    encrypted = await asyncio.to_thread(client.wrap_socket, ours)
    peer = await shaken
    loop = asyncio.get_running_loop()
    line = StoreLine(cast("Any", SimpleNamespace(_sock=encrypted, _force_close=encrypted.close)), loop)
    answer: asyncio.Future[Rows] = loop.create_future()
    line.send(Statement("SELECT", (octets,)), lambda rows, error: answer.set_result(rows if error is None else ()))
    # More than one record of TLS holds, and the last octets in one of their own.
    rows = [row(bytes([n]) * 200) for n in range(250)] * 2
    data = packets(b"\1", b"column", end(), *rows, end())
    await asyncio.to_thread(peer.sendall, data[:-3])
    await asyncio.sleep(0.05)
    assert not answer.done()
    await asyncio.to_thread(peer.sendall, data[-3:])
    assert len(await told(answer)) == 500
    line.close()
    peer.close()


def tls_contexts(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    names = ["-keyout", str(key), "-out", str(certificate), "-subj", "/CN=store", "-days", "2"]
    subprocess.run([*command, *names], check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(certificate)
    return server, client
