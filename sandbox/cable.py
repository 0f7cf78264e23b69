"""A line between two sites that can be cut and healed at any time, and made longer.

A cut comes in two kinds. `die`: connections are reset, and new ones too, as when a router says that there is no way.
`hang`: everything stays open and nothing passes, as on a line that drops every packet; what was on its way arrives
after the healing, if both ends still wait for it. One thread serves all lines of a cable; it ends with `close`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Self

from sandbox.ports import LOOPBACK, free_port

Kind = Literal["die", "hang"]
# What may be on its way in one direction: beyond it, the sender waits, as it would for a window to open.
_ON_ITS_WAY = 1024
_CHUNK = 65536


@dataclass(eq=False)
class _Connection:
    """Both halves of one connection through the cable."""

    near: asyncio.StreamWriter
    far: asyncio.StreamWriter | None = None
    ended: bool = field(default=False)

    def abort(self) -> None:
        self.ended = True
        for writer in (self.near, self.far):
            if writer is not None:
                _reset(writer)


class Cable:
    """Any number of lines, cut and healed together. It is whole at first."""

    def __init__(self, latency_seconds: float = 0.0) -> None:
        """`latency_seconds` is added in each direction; it may be changed at any time."""
        self.latency_seconds = latency_seconds
        self._state: Kind | None = None
        self._connections: set[_Connection] = set()
        self._servers: list[asyncio.Server] = []
        self._loop = asyncio.new_event_loop()
        self._whole = asyncio.Event()
        self._whole.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cable", daemon=True)
        self._thread.start()

    def line(self, far_port: int, port: int | None = None) -> int:
        """A new line to a port of this machine; the port at its near end."""
        near_port = port or free_port()

        async def listen() -> None:
            server = await asyncio.start_server(
                lambda reader, writer: self._carry(reader, writer, far_port), LOOPBACK, near_port
            )
            self._servers.append(server)

        asyncio.run_coroutine_threadsafe(listen(), self._loop).result(10)
        return near_port

    def cut(self, kind: Kind = "die") -> None:
        """Nothing passes from now on."""
        self._do(lambda: self._cut(kind))

    def heal(self) -> None:
        """It is whole again."""
        self._do(self._heal)

    @property
    def is_cut(self) -> bool:
        return self._state is not None

    @property
    def connections(self) -> int:
        """How many are open through it now."""
        return len(self._connections)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all lines and connections."""
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _do(self, change: Callable[[], None]) -> None:
        """Returns when the change is in force."""
        done = threading.Event()

        def run() -> None:
            change()
            done.set()

        self._loop.call_soon_threadsafe(run)
        done.wait(10)

    def _cut(self, kind: Kind) -> None:
        self._state = kind
        self._whole.clear()
        if kind == "die":
            for connection in tuple(self._connections):
                connection.abort()

    def _heal(self) -> None:
        self._state = None
        self._whole.set()

    async def _end(self) -> None:
        for server in self._servers:
            server.close()
        own = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not own]
        for connection in tuple(self._connections):
            connection.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, far_port: int) -> None:
        connection = _Connection(writer)
        self._connections.add(connection)
        try:
            if self._state == "die":
                return
            # The far end sees no connection before the line is healed.
            await self._whole.wait()
            far_reader, connection.far = await asyncio.open_connection(LOOPBACK, far_port)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(reader, connection.far, connection))
                both.create_task(self._pump(far_reader, writer, connection))
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            # Cancelled by `close` only; asyncio would report it as a fault of this callback.
            pass
        finally:
            connection.abort()
            self._connections.discard(connection)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: _Connection) -> None:
        """One direction. A reader of its own, so that latency delays what passes and does not narrow it."""
        on_its_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_ON_ITS_WAY)

        async def take_in() -> None:
            while data := await reader.read(_CHUNK):
                await on_its_way.put((time.monotonic() + self.latency_seconds, data))
            await on_its_way.put((0.0, b""))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(take_in())
            while (item := await on_its_way.get())[1]:
                await self._deliver(item, writer, connection)
            # The end itself arrives no sooner than the rest.
            await self._whole.wait()
            with contextlib.suppress(OSError):
                writer.write_eof()

    async def _deliver(self, item: tuple[float, bytes], writer: asyncio.StreamWriter, connection: _Connection) -> None:
        due, data = item
        if (pause_seconds := due - time.monotonic()) > 0:
            await asyncio.sleep(pause_seconds)
        await self._whole.wait()
        if connection.ended:
            raise ConnectionResetError("the cable was cut")
        writer.write(data)
        await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection without waiting, with a reset where the system can."""
    one = writer.get_extra_info("socket")
    if one is not None:
        with contextlib.suppress(OSError):
            # Linger on, for no time.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    transport = writer.transport
    transport.abort()
