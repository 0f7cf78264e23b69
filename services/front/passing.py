"""One connection's way through the front, and the choice of who gets it.

Until an api has sent its first octet it has done nothing: what the client sent so far (a ClientHello) is kept, and may
be given to another api, which is how the end of one costs nobody anything. From the first octet on the connection is
that api's, to its end, since a key may have been given out on it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence

HOLD_SECONDS = 60.0
_CONNECT_SECONDS = 1.0
_RETRY_SECONDS = 0.1
# A connection that each api ends without a word is ended: the client is what they do not want.
_UNANSWERED_LIMIT = 3
_CHUNK_BYTES = 16_384
_KEPT_BYTES = 65_536


class Backends:
    """The apis, each its turn."""

    def __init__(self, addresses: Sequence[tuple[str, int]]) -> None:
        self._addresses = tuple(addresses)
        self._next = 0

    async def connect(self, deadline: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """A connection to the first one that takes it; None where none does until ``deadline`` (loop time)."""
        loop = asyncio.get_running_loop()
        while True:
            for host, port in self._turns():
                # A name that is unknown belongs to a container that is being made anew.
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(_CONNECT_SECONDS):
                        return await asyncio.open_connection(host, port)
            if loop.time() > deadline:
                return None
            await asyncio.sleep(_RETRY_SECONDS)

    def _turns(self) -> Iterator[tuple[str, int]]:
        first = self._next
        self._next = (first + 1) % len(self._addresses)
        yield from self._addresses[first:]
        yield from self._addresses[:first]


class Passage:
    """One client's connection."""

    def __init__(self, backends: Backends, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._backends = backends
        self._reader = reader
        self._writer = writer
        self._kept = b""

    async def run(self) -> None:
        """Returns when the connection has ended; nothing is raised for what either end does."""
        try:
            with contextlib.suppress(OSError, EOFError):
                await self._pass_on()
        finally:
            _close(self._writer)

    async def _pass_on(self) -> None:
        # Nothing is asked of an api before the client has said something.
        self._kept = await self._reader.read(_CHUNK_BYTES)
        deadline = asyncio.get_running_loop().time() + HOLD_SECONDS
        for _ in range(_UNANSWERED_LIMIT if self._kept else 0):
            backend = await self._backends.connect(deadline)
            if backend is None or await self._pass_to(*backend):
                return

    async def _pass_to(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether that api answered at all."""
        upstream: asyncio.Task[None] | None = None
        try:
            writer.write(self._kept)
            upstream = asyncio.create_task(self._send_on(writer), name="upstream")
            first = await _read(reader)
            if not first:
                return False
            self._kept = b""
            self._writer.write(first)
            await _copy(reader, self._writer)
            return True
        finally:
            _close(writer)
            if upstream is not None:
                upstream.cancel()
                await asyncio.wait({upstream})

    async def _send_on(self, writer: asyncio.StreamWriter) -> None:
        """What the client sends; kept too, as long as no api has answered."""
        answered = False
        with contextlib.suppress(OSError):
            while chunk := await self._reader.read(_CHUNK_BYTES):
                answered = answered or not self._kept
                if not answered:
                    self._kept = (self._kept + chunk)[:_KEPT_BYTES]
                writer.write(chunk)
                await writer.drain()
            writer.write_eof()


async def _read(reader: asyncio.StreamReader) -> bytes:
    """The next octets; none where the connection ends, however it does."""
    try:
        return await reader.read(_CHUNK_BYTES)
    except OSError:
        return b""


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await _read(reader):
        writer.write(chunk)
        await writer.drain()


def _close(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, RuntimeError):
        writer.close()
