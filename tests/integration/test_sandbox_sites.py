"""The line between two sites and the brokers at its ends: what a cut does, and that federation comes back from it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sandbox.cable import Cable, Kind
from sandbox.federation import Account, Upstream, definitions
from sandbox.ports import LOOPBACK
from sandbox.rabbitmq import RabbitMqServer
from skipbus.shared.broker.names import queue_name, routing_key
from tests.system.broker_admin import BrokerAdmin
from tests.waiting import wait_for

TARGET = "KP_Bob"
HEALED_SECONDS = 20.0


class Echo:
    """A server that sends back what it is sent."""

    def __init__(self) -> None:
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                one, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(one,), daemon=True).start()

    def _answer(self, one: socket.socket) -> None:
        with one:
            try:
                while data := one.recv(65536):
                    one.sendall(data)
            except OSError:
                pass


@pytest.fixture
def client(cable: Cable) -> Iterator[socket.socket]:
    """A connection to an echo through the cable."""
    echo = Echo()
    with socket.create_connection((LOOPBACK, cable.line(echo.port)), timeout=5) as one:
        assert ask(one, b"hello") == b"hello"
        yield one
    echo.close()


def ask(one: socket.socket, data: bytes) -> bytes:
    one.sendall(data)
    return receive(one, len(data))


def receive(one: socket.socket, length: int) -> bytes:
    found = b""
    while len(found) < length and (data := one.recv(65536)):
        found += data
    return found


class TestCable:
    def test_a_megabyte_passes_unchanged(self, client: socket.socket) -> None:
        data = bytes(range(256)) * 4096
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(receive, client, len(data))
            client.sendall(data)
            assert answer.result(20) == data

    def test_a_cut_that_dies_resets_what_is_open_and_what_is_opened(self, cable: Cable, client: socket.socket) -> None:
        near_end = client.getpeername()
        cable.cut("die")
        with pytest.raises(ConnectionError):
            ask_until_ended(client)
        with pytest.raises(ConnectionError), socket.create_connection(near_end, timeout=5) as late:
            ask_until_ended(late)
        cable.heal()
        with socket.create_connection(near_end, timeout=5) as healed:
            assert ask(healed, b"again") == b"again"

    def test_a_cut_that_hangs_keeps_everything_open_and_passes_it_on_when_healed(
        self, cable: Cable, client: socket.socket
    ) -> None:
        cable.cut("hang")
        client.settimeout(0.5)
        client.sendall(b"late")
        with pytest.raises(TimeoutError):
            client.recv(10)
        with socket.create_connection(client.getpeername(), timeout=0.5) as silent:
            silent.sendall(b"new")
            with pytest.raises(TimeoutError):
                silent.recv(10)
            cable.heal()
            client.settimeout(5)
            silent.settimeout(5)
            assert receive(client, 4) == b"late"
            assert receive(silent, 3) == b"new"

    def test_latency_is_added_each_way_and_does_not_narrow_the_line(self, cable: Cable, client: socket.socket) -> None:
        cable.latency_seconds = 0.1
        started = time.monotonic()
        assert ask(client, b"x") == b"x"
        assert 0.2 <= time.monotonic() - started < 1
        started = time.monotonic()
        data = bytes(2_000_000)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(receive, client, len(data))
            client.sendall(data)
            assert len(answer.result(20)) == len(data)
        assert time.monotonic() - started < 3

    def test_the_end_of_one_side_reaches_the_other(self, cable: Cable, client: socket.socket) -> None:
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        wait_for(lambda: cable.connections == 0, timeout_seconds=5)


def ask_until_ended(one: socket.socket) -> None:
    """Raises ConnectionError once the connection has ended, in whichever way."""
    for _ in range(10):
        if not ask(one, b"x"):
            raise ConnectionResetError("ended")
        time.sleep(0.05)


class TestDefinitions:
    def test_every_other_site_is_an_upstream_of_its_own_in_every_virtual_host(self) -> None:
        upstreams = {"/": [Upstream("b", "amqp://b"), Upstream("c", "amqp://c")], "two": [Upstream("d", "amqp://d")]}
        made = json.loads(definitions(Account("user", 'pass"word'), "secret", upstreams))
        found = [(entry["vhost"], entry["name"], entry["value"]["uri"]) for entry in made["parameters"]]
        assert found == [("/", "b", "amqp://b"), ("/", "c", "amqp://c"), ("two", "d", "amqp://d")]
        assert [vhost["name"] for vhost in made["vhosts"]] == ["/", "two"]
        assert {policy["pattern"] for policy in made["policies"]} == {r"^skipbus\.envelopes$"}

    def test_no_place_is_left_open_and_no_password_stands_in_it(self) -> None:
        text = definitions(Account("user", "pass-word"), "secret-word", {"/": [Upstream("b", "amqp://b")]})
        assert "${" not in text
        assert "pass-word" not in text
        assert "secret-word" not in text


@pytest.fixture(scope="module")
def brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cable, RabbitMqServer, RabbitMqServer]]:
    """Two federated brokers and the cable between them."""
    cable = Cable()
    near, far = (RabbitMqServer(tmp_path_factory.mktemp(name)) for name in ("near", "far"))
    for here, there in ((near, far), (far, near)):
        here.federate({"/": [there.upstream("other", cable.line(there.port))]})
    try:
        for server in (near, far):
            server.launch()
        for server in (near, far):
            server.wait_ready()
        yield cable, near, far
    finally:
        cable.close()
        near.stop()
        far.stop()


@pytest.mark.parametrize(("kind", "seconds"), [("die", 1), ("die", 12), ("hang", 1), ("hang", 12)])
def test_what_is_published_during_a_cut_arrives_after_it(
    brokers: tuple[Cable, RabbitMqServer, RabbitMqServer], kind: Kind, seconds: float
) -> None:
    cable, near, far = brokers
    sender, receiver = BrokerAdmin(near.url), BrokerAdmin(far.url)
    queue = queue_name(TARGET)
    try:
        receiver.make_queue(queue, routing_key(TARGET))
        wait_passing(sender, receiver, queue)
        cable.cut(kind)
        wanted = {b"message %d" % number for number in range(200)}
        sender.send_many(TARGET, sorted(wanted))
        time.sleep(seconds)
        assert receiver.depth(queue) == 0
        cable.heal()
        found: set[bytes] = set()
        deadline = time.monotonic() + HEALED_SECONDS
        while not wanted <= found:
            assert time.monotonic() < deadline, f"{len(found)} of {len(wanted)} came"
            body = receiver.take(queue)
            if body is not None:
                found.add(body)
        assert found == wanted
    finally:
        receiver.delete_queue(queue)
        sender.close()
        receiver.close()


def wait_passing(sender: BrokerAdmin, receiver: BrokerAdmin, queue: str) -> None:
    """Until the brokers have exchanged what is bound."""

    def passes() -> bool:
        sender.send(TARGET, b"probe")
        time.sleep(0.2)
        return receiver.take(queue) is not None

    wait_for(passes, timeout_seconds=20)
    time.sleep(0.5)
    receiver.purge(queue)


def test_nothing_else_is_federated_and_the_federations_account_reaches_nothing_else(
    brokers: tuple[Cable, RabbitMqServer, RabbitMqServer], tmp_path: Path
) -> None:
    _, near, _ = brokers
    thief = near.upstream("near").uri.partition("?")[0]
    outsider = BrokerAdmin(thief)
    admin = BrokerAdmin(near.url)
    try:
        admin.make_queue("skipbus.kp.KP_Alice", "kp.KP_Alice")
        with pytest.raises(Exception, match=r"(?i)access|refused"):
            outsider.take("skipbus.kp.KP_Alice")
    finally:
        outsider.close()
        admin.delete_queue("skipbus.kp.KP_Alice")
        admin.close()
