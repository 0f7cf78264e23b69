"""Facts about steps that are driven on the event loop, with the server's end of the connection in the test's hands."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from skipbus.shared.errors import StoreRefused, StoreUnavailable
from skipbus.shared.store import line, loop_steps
from skipbus.shared.store.loop_steps import LoopSteps
from skipbus.shared.store.steps import Statement, Steps, octets
from tests.unit.test_results import MORE, end, error, ok, packets, row

QUERY = 3


class Server:
    """Takes connections, and answers each packet with what comes next in ``answers``; ``b""`` ends the connection."""

    def __init__(self) -> None:
        self.answers: list[bytes | None] = []
        self.heard: list[tuple[int, str]] = []
        self.connections = 0
        self.ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def connect(self, _mysql: object, *, several_statements: bool) -> Any:  # noqa: ANN401 -- PyMySQL's connection
        assert several_statements
        ours, theirs = socket.socketpair()
        self.ends.append(theirs)
        thread = threading.Thread(target=self._serve, args=(self.connections, theirs))
        self._threads.append(thread)
        self.connections += 1
        thread.start()
        return SimpleNamespace(_sock=ours, _force_close=ours.close)

    def _serve(self, number: int, end: socket.socket) -> None:
        # Whoever asks may go without waiting for the answer.
        with end, suppress(OSError):
            while packet := end.recv(4096):
                if packet[4] != QUERY:
                    continue
                self.heard.append((number, packet[5:].decode()))
                answer = self.answers.pop(0)
                if answer == b"":
                    break
                if answer is not None:
                    end.sendall(answer)

    def close(self) -> None:
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive(), "a connection was left open"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setattr(loop_steps, "connect", made.connect)
    return made


@pytest.fixture
async def runner(server: Server) -> AsyncIterator[LoopSteps]:
    made = LoopSteps(SimpleNamespace())  # type: ignore[arg-type]
    yield made
    made.close()
    await asyncio.to_thread(server.close)


def ask(*statements: str) -> Steps[list[object]]:
    found: list[object] = []
    for statement in statements:
        rows = yield Statement(statement, (octets,) if statement == "SELECT" else ())
        found += rows
    return found


async def test_rows_come_back_to_where_they_were_asked_for(server: Server, runner: LoopSteps) -> None:
    server.answers = [packets(b"\x01", b"def", end(), row(b"one"), end()), packets(ok())]
    assert await runner.run(ask("SELECT", "COMMIT")) == [(b"one",)]
    assert server.heard == [(0, "SELECT"), (0, "COMMIT")]


async def test_a_step_that_takes_long_is_done_in_a_thread(runner: LoopSteps) -> None:
    where: list[threading.Thread] = []

    def steps() -> Steps[str]:
        yield lambda: where.append(threading.current_thread())
        return "done"

    assert await runner.run(steps()) == "done"
    assert where[0] is not threading.main_thread()


async def test_after_a_refusal_it_is_rolled_back_and_the_connection_goes_on(server: Server, runner: LoopSteps) -> None:
    server.answers = [packets(ok(MORE), error(1062, b"duplicate")), packets(ok()), packets(ok())]
    with pytest.raises(StoreRefused, match="1062"):
        await runner.run(ask("INSERT;COMMIT"))
    await runner.run(ask("COMMIT"))
    assert server.heard == [(0, "INSERT;COMMIT"), (0, "ROLLBACK"), (0, "COMMIT")]


async def test_a_refusal_that_the_steps_take_is_no_ones_else(server: Server, runner: LoopSteps) -> None:
    def steps() -> Steps[str]:
        try:
            yield Statement("INSERT")
        except StoreRefused:
            yield Statement("ROLLBACK")
        return "done"

    server.answers = [packets(error(1062, b"duplicate")), packets(ok())]
    assert await runner.run(steps()) == "done"
    assert server.heard == [(0, "INSERT"), (0, "ROLLBACK")]


@pytest.mark.parametrize(
    "answer", [b"", packets(error(1927, b"killed")), packets(error(1064, b"what?"))], ids=["gone", "killed", "refused"]
)
async def test_a_rollback_that_fails_ends_the_connection_and_hides_nothing(
    server: Server, runner: LoopSteps, answer: bytes
) -> None:
    server.answers = [packets(error(1062, b"duplicate")), answer, packets(ok())]
    with pytest.raises(StoreRefused, match="1062"):
        await runner.run(ask("INSERT"))
    await runner.run(ask("COMMIT"))
    assert server.heard == [(0, "INSERT"), (0, "ROLLBACK"), (1, "COMMIT")]


async def test_a_connection_that_breaks_is_told_of_and_made_anew(server: Server, runner: LoopSteps) -> None:
    server.answers = [b"", packets(ok())]
    with pytest.raises(StoreUnavailable):
        await runner.run(ask("COMMIT"))
    await runner.run(ask("COMMIT"))
    assert server.heard == [(0, "COMMIT"), (1, "COMMIT")]


async def test_a_connection_that_the_server_ends_while_nothing_is_asked_is_made_anew(
    server: Server, runner: LoopSteps
) -> None:
    server.answers = [packets(ok()), packets(ok())]
    await runner.run(ask("COMMIT"))
    server.ends[0].shutdown(socket.SHUT_RDWR)
    await asyncio.sleep(0.05)
    await runner.run(ask("COMMIT"))
    assert server.heard == [(0, "COMMIT"), (1, "COMMIT")]


async def test_a_server_that_stalls_is_given_up_in_time(
    server: Server, runner: LoopSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (line, loop_steps):
        monkeypatch.setattr(module, "STATEMENT_TIMEOUT_SECONDS", 0.2)
    server.answers = [None]
    async with asyncio.timeout(5):
        with pytest.raises(StoreUnavailable):
            await runner.run(ask("COMMIT"))


async def test_what_the_steps_raise_themselves_ends_the_connection(server: Server, runner: LoopSteps) -> None:
    def steps() -> Steps[None]:
        yield Statement("INSERT")
        raise RuntimeError("a fault")

    server.answers = [packets(ok()), packets(ok())]
    with pytest.raises(RuntimeError, match="a fault"):
        await runner.run(steps())
    await runner.run(ask("COMMIT"))
    assert [number for number, _ in server.heard] == [0, 1]


async def test_what_fails_meanwhile_ends_the_connection(server: Server, runner: LoopSteps) -> None:
    def fail() -> None:
        raise RuntimeError("a fault")

    def steps() -> Steps[None]:
        yield Statement("COMMIT", meanwhile=fail)

    server.answers = [packets(ok()), packets(ok())]
    with pytest.raises(RuntimeError, match="a fault"):
        await runner.run(steps())
    await runner.run(ask("COMMIT"))
    assert server.connections == 2


async def test_whoever_is_cancelled_leaves_no_statement_behind(server: Server, runner: LoopSteps) -> None:
    server.answers = [None, packets(ok())]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await runner.run(ask("COMMIT"))
    await runner.run(ask("COMMIT"))
    assert server.heard == [(0, "COMMIT"), (1, "COMMIT")]
