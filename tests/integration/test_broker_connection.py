"""A connection to the broker that dies, with and without a word, is noticed, and made again when the broker is back."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable

import pytest

from sandbox.cable import Cable
from sandbox.ports import LOOPBACK, free_port
from sandbox.rabbitmq import RabbitMqServer
from skipbus.shared.broker.connection import BrokerConnection, Session
from skipbus.shared.errors import BusUnavailable
from skipbus.shared.settings import Secret
from tests.integration.broker_process import BrokerProcess
from tests.waiting import wait_for

# Three AMQP heartbeats of 5 s and three seconds, and the 5 s that closing the dead connection may take.
SILENCE_SECONDS = 23.0
LOADED_SECONDS = 10.0


@pytest.fixture
def process(rabbitmq: RabbitMqServer, cable: Cable) -> BrokerProcess:
    """It reaches the broker by way of the cable."""
    url = rabbitmq.url.replace(f"{LOOPBACK}:{rabbitmq.port}", f"{LOOPBACK}:{cable.line(rabbitmq.port)}")
    return BrokerProcess(url, f"KP_Cable.{secrets.token_hex(3)}")


async def wait_lost(process: BrokerProcess, seconds: float) -> None:
    """Until the process knows."""
    await asyncio.to_thread(wait_for, lambda: not process.broker.up.is_set(), timeout_seconds=seconds)


async def test_a_connection_that_dies_without_a_word_is_noticed_by_a_process_that_only_waits(
    process: BrokerProcess, cable: Cable
) -> None:
    async with process.connected():
        cable.cut("hang")
        await wait_lost(process, SILENCE_SECONDS + LOADED_SECONDS)
        assert process.broker.fault is not None
        with pytest.raises(BusUnavailable):
            await process.publisher.publish("KP_Nobody", b"", lifetime_ms=None)
        cable.heal()
        async with asyncio.timeout(SILENCE_SECONDS + LOADED_SECONDS):
            await process.broker.up.wait()
        assert process.broker.fault is None


async def test_a_connection_that_is_reset_is_made_again_within_a_moment(process: BrokerProcess, cable: Cable) -> None:
    async with process.connected():
        cable.cut("die")
        await wait_lost(process, LOADED_SECONDS)
        cable.heal()
        async with asyncio.timeout(LOADED_SECONDS):
            await process.broker.up.wait()
        assert not await process.publisher.publish("KP_Nobody", b"", lifetime_ms=None)


async def test_a_publish_over_a_dead_connection_ends_at_its_deadline(process: BrokerProcess, cable: Cable) -> None:
    async with process.connected():
        cable.cut("hang")
        started = time.monotonic()
        for lifetime_ms in (None, 60_000):
            with pytest.raises(BusUnavailable):
                await process.publisher.publish("KP_Nobody", b"", lifetime_ms=lifetime_ms)
        assert time.monotonic() - started < SILENCE_SECONDS + LOADED_SECONDS
        assert process.publisher.silent or not process.broker.up.is_set()
        cable.heal()


class Part:
    """A part that does in its first session what it is given, and nothing in later ones."""

    def __init__(self, first: Callable[[Session], None]) -> None:
        self.sessions = 0
        self._first = first

    async def set_up(self, session: Session) -> None:
        self.sessions += 1
        if self.sessions == 1:
            self._first(session)

    def forget(self) -> None:
        pass


def fault() -> None:
    raise RuntimeError("a fault of ours")


async def test_a_fault_of_ours_does_not_look_like_a_broker_that_is_away(rabbitmq: RabbitMqServer) -> None:
    broker = BrokerConnection(Secret(rabbitmq.url), "test", [Part(lambda _session: fault())])
    with pytest.RaisesGroup(RuntimeError):
        async with asyncio.timeout(LOADED_SECONDS), broker.connected():
            await broker.up.wait()


async def test_an_error_without_a_kind_on_a_lost_connection_is_its_loss(rabbitmq: RabbitMqServer) -> None:
    def lose(session: Session) -> None:
        session.lost.set()
        raise RuntimeError("what the library says of a connection that is closed")

    part = Part(lose)
    broker = BrokerConnection(Secret(rabbitmq.url), "test", [part])
    async with asyncio.timeout(LOADED_SECONDS), broker.connected():
        await broker.up.wait()
    assert part.sessions == 2


async def test_a_session_whose_task_fails_is_replaced(rabbitmq: RabbitMqServer) -> None:
    async def fail() -> None:
        fault()

    part = Part(lambda session: session.start(fail(), "test"))
    broker = BrokerConnection(Secret(rabbitmq.url), "test", [part])
    async with asyncio.timeout(LOADED_SECONDS), broker.connected():
        await asyncio.to_thread(wait_for, lambda: part.sessions == 2, timeout_seconds=LOADED_SECONDS)


async def test_of_several_brokers_one_that_is_away_is_passed_over(rabbitmq: RabbitMqServer) -> None:
    away = free_port()
    urls = f"amqp://guest:a,b@{LOOPBACK}:{away}/,{rabbitmq.url}"
    process = BrokerProcess(urls, f"KP_Several.{secrets.token_hex(3)}")
    assert process.broker.server == f"{LOOPBACK}:{away}"
    async with process.connected():
        assert process.broker.server == f"{LOOPBACK}:{rabbitmq.port}"
