"""The floor under a key that is placed over a bus link: its durable commits and its hops over the bus, done bare.

One process, no skipbus code, nothing sealed, nothing signed, nobody else to wait for. A round is what cannot be left
out: four commits (the key at its source, its number, the key at its target, its end at the source) and four hops (to
the syncer and back by a transient exchange, to the other site and back by the federated one, into quorum queues). What
travels and what is stored has the size of the real thing.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aio_pika
import uvloop
from aio_pika.abc import AbstractConnection, AbstractExchange, AbstractIncomingMessage

from sandbox.mariadb import Database
from sandbox.two_sites import TwoSites
from skipbus.shared.broker.names import ENVELOPES

# An envelope with one key: a sealed and signed wrapping key (6.4 kB), a record, the envelope's own signature (4.6 kB).
_ENVELOPE_BYTES = 11_200
_ACKNOWLEDGEMENT_BYTES = 4_800
_ROW_BYTES = 250
_NOTIFICATIONS = "bench.notifications"
_TABLE = "bench_link"
_RECEIVE_SECONDS = 10.0
# The brokers tell each other what is bound a moment after it was.
_BOUND_SECONDS = 20.0


@dataclass(frozen=True)
class _Way:
    """Where a message is sent, and where it arrives."""

    exchange: AbstractExchange
    key: str
    arrivals: asyncio.Queue[AbstractIncomingMessage]
    durable: bool

    async def go(self, body: bytes) -> AbstractIncomingMessage:
        mode = aio_pika.DeliveryMode.PERSISTENT if self.durable else aio_pika.DeliveryMode.NOT_PERSISTENT
        await self.exchange.publish(aio_pika.Message(body, delivery_mode=mode), self.key)
        return await asyncio.wait_for(self.arrivals.get(), _RECEIVE_SECONDS)


class BareLink:
    """Does the rounds between the servers of two sites."""

    def __init__(self, sites: TwoSites) -> None:
        self._sites = sites

    def round_median_us(self, count: int) -> float:
        """Median time of a round."""
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(self._measure(count))

    async def _measure(self, count: int) -> float:
        connections = [await aio_pika.connect(server.url) for server in self._sites.rabbitmq_servers]
        stores = [_Store(server.dsn) for server in self._sites.mysql_servers]
        try:
            times_us = await self._rounds(connections, stores, count)
        finally:
            for store in stores:
                store.close()
            for connection in connections:
                await connection.close()
        return statistics.median(times_us)

    async def _rounds(
        self, connections: Sequence[AbstractConnection], stores: Sequence[_Store], count: int
    ) -> list[float]:
        near, far = connections
        out, back = await _federated(near, far, "bench.far"), await _federated(far, near, "bench.near")
        to_syncer, to_api = await _transient(near, "syncer"), await _transient(near, "api")
        source, target = stores
        envelope, acknowledgement = os.urandom(_ENVELOPE_BYTES), os.urandom(_ACKNOWLEDGEMENT_BYTES)
        times_us = []
        for number in range(count):
            started = time.perf_counter()
            source.execute(f"INSERT INTO {_TABLE} VALUES ({number}, 0, 0x{os.urandom(_ROW_BYTES).hex()})")
            await to_syncer.go(b"")
            source.execute(f"UPDATE {_TABLE} SET number = {number + 1} WHERE id = {number}")
            arrived = await out.go(envelope)
            target.execute(f"INSERT INTO {_TABLE} VALUES ({number}, 0, 0x{os.urandom(_ROW_BYTES).hex()})")
            await arrived.ack()
            arrived = await back.go(acknowledgement)
            source.execute(f"DELETE FROM {_TABLE} WHERE id = {number}")
            await arrived.ack()
            await to_api.go(b"")
            times_us.append((time.perf_counter() - started) * 1e6)
        return times_us


class _Store:
    """One connection, each statement of which is a durable commit."""

    def __init__(self, database: Database) -> None:
        self._connection = database.connect()
        self.execute(f"DROP TABLE IF EXISTS {_TABLE}")
        self.execute(f"CREATE TABLE {_TABLE} (id BIGINT PRIMARY KEY, number BIGINT, payload BLOB) ENGINE=InnoDB")

    def execute(self, statement: str) -> None:
        with self._connection.cursor() as cursor:
            cursor.execute(statement)

    def close(self) -> None:
        self.execute(f"DROP TABLE {_TABLE}")
        self._connection.close()


async def _federated(near: AbstractConnection, far: AbstractConnection, key: str) -> _Way:
    """From one site's exchange into a quorum queue at the other."""
    arrivals: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
    receiving = await far.channel()
    queue = await receiving.declare_queue(key, durable=True, arguments={"x-queue-type": "quorum"})
    await queue.bind(ENVELOPES, key)
    await queue.consume(arrivals.put)
    # Unconfirmed: the arrival says that the broker had it.
    sending = await near.channel(publisher_confirms=False)
    way = _Way(await sending.get_exchange(ENVELOPES, ensure=False), key, arrivals, durable=True)
    await _until_it_passes(way)
    return way


async def _until_it_passes(way: _Way) -> None:
    async with asyncio.timeout(_BOUND_SECONDS):
        while True:
            await way.exchange.publish(aio_pika.Message(b""), way.key)
            await asyncio.sleep(0.2)
            if not way.arrivals.empty():
                break
    while not way.arrivals.empty():
        await way.arrivals.get_nowait().ack()


async def _transient(connection: AbstractConnection, key: str) -> _Way:
    """From a process to another one at the same site."""
    arrivals: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
    channel = await connection.channel(publisher_confirms=False)
    exchange = await channel.declare_exchange(_NOTIFICATIONS, aio_pika.ExchangeType.TOPIC, auto_delete=True)
    queue = await channel.declare_queue(exclusive=True, auto_delete=True)
    await queue.bind(exchange, key)
    await queue.consume(arrivals.put, no_ack=True)
    return _Way(exchange, key, arrivals, durable=False)
