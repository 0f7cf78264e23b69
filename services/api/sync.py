"""``POST /sync``: envelopes of peers that cannot reach this KP's broker.

Rules: an envelope is answered 202 once the local broker has it in this KP's own queue, where the syncer receives it
like one from the bus. Checked here: that it is one envelope, for this KP, with a peer's signature. The syncer judges
date and number. A KP without bus peers refuses every envelope. Any client can send here: the size of a body, the memory
of all bodies and of those from one address are bounded while they are read, and signatures are verified in a few
threads, only under names of known peers.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from aiohttp import ClientPayloadError, web
from aiohttp.http_exceptions import HttpProcessingError

from skipbus.services.api import metrics
from skipbus.services.api.http.access_log import Entry
from skipbus.services.api.http.responses import RouteError, json_response
from skipbus.shared.broker.publishing import Publisher
from skipbus.shared.errors import BusUnavailable, EnvelopeRefused, Overloaded
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol.envelopes import (
    MAX_AGE_MS,
    MAX_ENVELOPE_BYTES,
    VERSION,
    SignedEnvelope,
    check_envelope,
    read_claim,
    read_envelope,
)
from skipbus.shared.settings import Settings

PATH = "/sync"
MAX_HELD_BYTES = 64 * 1024 * 1024
MAX_HELD_PER_ADDRESS = MAX_HELD_BYTES // 4
MAX_CHECKS_WAITING = 256
_CHECKS_AT_ONCE = 2
# How long a refused body is still read and thrown away: a client that is still writing does not see its answer.
_DISCARD_SECONDS = 2.0
_STATUSES = {"too_large": 413, "unknown_sender": 401, "bad_signature": 401}


class SyncRefused(RouteError):
    """An envelope that is refused; the reason is one of the syncer's."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(status, message)
        self.details: dict[str, Any] = {"reason": reason}
        if reason == "unknown_version":
            self.details["versions"] = [VERSION]


class SyncEndpoint:
    """Not thread-safe: use it on one event loop."""

    def __init__(self, settings: Settings, directory: PeerDirectory, publisher: Publisher | None) -> None:
        """``publisher`` is None for a KP without bus peers."""
        self._local_id = settings.local_system_id
        self._directory = directory
        self._publisher = publisher
        self._body_timeout_seconds = settings.header_timeout_seconds
        self._bodies = _Bodies()
        self._checks = asyncio.Semaphore(_CHECKS_AT_ONCE)
        self._waiting = 0

    async def handle(self, request: web.BaseRequest, entry: Entry) -> web.Response:
        """202, or SyncRefused, RouteError, Overloaded."""
        held = _Held(self._bodies, request.remote or "-")
        try:
            if self._publisher is None:
                await _discard(request)
                raise _unknown_sender()
            body = await self._read(request, held)
            await self._take_in(self._publisher, body, entry)
        except SyncRefused as error:
            metrics.count_sync_refused(error.details["reason"], entry.remote_system_id)
            raise
        finally:
            held.release()
        return json_response({"status": "accepted"}, 202)

    async def _take_in(self, publisher: Publisher, body: bytes, entry: Entry) -> None:
        envelope = self._parse(body, entry)
        await self._verify(envelope)
        try:
            await self._publish(publisher, body, live=envelope.header.type.is_live)
        except BusUnavailable as error:
            raise RouteError(503, "the broker of this key provider did not take the envelope; send it again") from error

    async def _publish(self, publisher: Publisher, body: bytes, *, live: bool) -> None:
        """Puts the envelope into this KP's own queue and returns once the broker has it. Raises BusUnavailable."""
        taken = await publisher.publish(self._local_id, body, lifetime_ms=None if live else MAX_AGE_MS)
        if not taken and not live:
            raise BusUnavailable("the broker has no queue for this key provider: its syncer has never run")

    def _parse(self, body: bytes, entry: Entry) -> SignedEnvelope:
        try:
            envelope = read_envelope(body)
        except EnvelopeRefused as error:
            claim = read_claim(body) if error.reason == "unknown_version" else None
            self._note_sender(claim.sender if claim else None, entry)
            raise _refused(error) from error
        self._note_sender(envelope.header.sender, entry)
        return envelope

    def _note_sender(self, sender: str | None, entry: Entry) -> None:
        """For the log and the counters, which strangers must not fill with names."""
        if sender is not None and self._pin(sender) is not None:
            entry.remote_system_id = sender

    def _pin(self, sender: str) -> bytes | None:
        if self._publisher is None or not self._directory.allows(sender):
            return None
        return self._directory.pin(sender)

    async def _verify(self, envelope: SignedEnvelope) -> None:
        pin = self._pin(envelope.header.sender)
        if pin is None:
            raise _unknown_sender()
        if self._waiting >= MAX_CHECKS_WAITING:
            raise Overloaded("too many envelopes wait to be verified; try again")
        self._waiting += 1
        try:
            async with self._checks:
                await asyncio.to_thread(self._check, envelope, pin)
        except EnvelopeRefused as error:
            raise _refused(error) from error
        finally:
            self._waiting -= 1

    def _check(self, envelope: SignedEnvelope, pin: bytes) -> None:
        # With its own date as the time: the syncer checks the date, and notifies the sender.
        check_envelope(envelope, self._local_id, pin, envelope.header.date_ms)

    async def _read(self, request: web.BaseRequest, held: _Held) -> bytes:
        too_large = (request.content_length or 0) > MAX_ENVELOPE_BYTES
        if request.headers.get("Expect", "").lower() == "100-continue":
            if too_large:
                raise _too_large()
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        elif request.headers.get("Expect"):
            raise RouteError(417, "no expectation but 100-continue is met here")
        try:
            async with asyncio.timeout(self._body_timeout_seconds):
                if too_large:
                    raise _too_large()
                body = await _read_at_most(request, held, MAX_ENVELOPE_BYTES)
        except TimeoutError:
            raise RouteError(408, f"the body was not complete within {self._body_timeout_seconds:g} s") from None
        except (OSError, ClientPayloadError, HttpProcessingError, web.RequestPayloadError) as error:
            raise SyncRefused(400, "malformed", "the body did not come as announced") from error
        except (SyncRefused, Overloaded):
            held.release()
            await _discard(request)
            raise
        return body


class _Bodies:
    """The memory that the bodies of all requests take, in bytes."""

    def __init__(self) -> None:
        self.total = 0
        self.of_address: Counter[str] = Counter()


class _Held:
    """The memory of one body, counted while it arrives: a Content-Length proves nothing."""

    def __init__(self, bodies: _Bodies, address: str) -> None:
        self._bodies = bodies
        self._address = address
        self._bytes = 0

    def take(self, count: int) -> None:
        """Raises Overloaded where a bound is reached."""
        of_address = self._bodies.of_address[self._address]
        if self._bodies.total + count > MAX_HELD_BYTES or of_address + count > MAX_HELD_PER_ADDRESS:
            raise Overloaded("too many envelopes are on their way in; try again")
        self._add(count)

    def release(self) -> None:
        """All of it. An address that holds nothing is forgotten."""
        self._add(-self._bytes)
        if not self._bodies.of_address[self._address]:
            del self._bodies.of_address[self._address]

    def _add(self, count: int) -> None:
        self._bytes += count
        self._bodies.total += count
        self._bodies.of_address[self._address] += count


async def _read_at_most(request: web.BaseRequest, held: _Held, limit: int) -> bytes:
    """The body; raises SyncRefused where it is longer, and Overloaded."""
    chunks = bytearray()
    while chunk := await request.content.readany():
        if len(chunks) + len(chunk) > limit:
            raise _too_large()
        held.take(len(chunk))
        chunks += chunk
    return bytes(chunks)


async def _discard(request: web.BaseRequest) -> None:
    if request.headers.get("Expect"):
        return  # the client waits for an answer before it sends a body
    try:
        async with asyncio.timeout(_DISCARD_SECONDS):
            while await request.content.readany():
                pass
    except (TimeoutError, OSError, ClientPayloadError, HttpProcessingError, web.RequestPayloadError):
        return


def _unknown_sender() -> SyncRefused:
    return SyncRefused(401, "unknown_sender", "the envelope's sender is not a peer of this key provider")


def _too_large() -> SyncRefused:
    return SyncRefused(413, "too_large", f"an envelope has at most {MAX_ENVELOPE_BYTES} bytes")


def _refused(error: EnvelopeRefused) -> SyncRefused:
    return SyncRefused(_STATUSES.get(error.reason, 400), error.reason, str(error))
