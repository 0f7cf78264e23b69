"""Envelopes by HTTPS, for a peer with an ``endpoint``: POST {endpoint}/sync instead of the bus, one after another.

At most one request is on its way to a peer, so envelopes arrive in the order in which they are sent. After a temporary
failure (no connection, no answer in time, 503) an envelope is tried again with growing pauses; after ``TRY_SECONDS`` it
is given back to its sender, whose outbox keeps it. 400, 401 and 413 reject the envelope itself.

TLS uses the peer's own CA file, or the system's. An answer may be of any length; at most ``MAX_ANSWER_BYTES`` are read.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Awaitable, Callable

import aiohttp
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from skipbus.services.syncer.transport import Outcome, PeerAnswer
from skipbus.shared.logging import get_logger
from skipbus.shared.protocol.envelopes import MAX_ENVELOPE_BYTES
from skipbus.shared.protocol.payloads import printable
from skipbus.shared.settings.peers import PeerSettings

CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 10.0
# For how long one envelope is tried before its sender gets it back.
TRY_SECONDS = 8.0
RETRY_FIRST_SECONDS = 0.2
RETRY_LAST_SECONDS = 4.0
# After that the peer is left alone for a while, longer each time.
SUSPENSION_FIRST_SECONDS = 1.0
SUSPENSION_LAST_SECONDS = 30.0
MAX_ANSWER_BYTES = 4_096
# Heartbeats and announcements that wait for their turn; a later one would arrive too late to be of use.
MAX_LIVE = 4
_REJECTIONS = {400: "malformed", 401: "unknown_sender", 413: "too_large"}

OnAnswer = Callable[[PeerAnswer], Awaitable[None]]

_log = get_logger("https")


class _NotNow(Exception):
    """The peer could not be reached or could not take the envelope; worth another try."""

    def __init__(self, message: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class HttpsPeer:
    """One peer. Of one event loop; ``close`` it."""

    def __init__(self, peer: PeerSettings, stop: asyncio.Event) -> None:
        """Raises OSError or ssl.SSLError where the CA file cannot be used."""
        self.peer_id = peer.system_id
        self._url = f"{peer.endpoint}/sync"
        self._context = ssl.create_default_context(cafile=peer.endpoint_ca_file)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._stop = stop
        self._session: aiohttp.ClientSession | None = None
        self._turn = asyncio.Lock()
        self._live: set[asyncio.Task[None]] = set()
        self._failed: str | None = None
        self._suspension_seconds = 0.0
        self._suspended_until = 0.0

    @property
    def suspended(self) -> bool:
        """Whether the peer is left alone for a while, because it could not be reached."""
        return time.monotonic() < self._suspended_until

    async def post(self, envelope: bytes) -> PeerAnswer:
        """Sends one envelope, again and again for TRY_SECONDS if need be. Raises nothing for a peer that is away."""
        async with self._turn:
            try:
                async for attempt in self._tries():
                    with attempt:
                        return await self._post_once(envelope)
            except _NotNow as error:
                self._note_failure(str(error))
                self._suspension_seconds = min(
                    max(2 * self._suspension_seconds, SUSPENSION_FIRST_SECONDS), SUSPENSION_LAST_SECONDS
                )
                self._suspended_until = time.monotonic() + self._suspension_seconds
        return PeerAnswer(Outcome.LOST)

    def post_soon(self, envelope: bytes, on_answer: OnAnswer) -> bool:
        """Sends what is of no use later: tried once, when its turn comes. False where too much waits."""
        if len(self._live) >= MAX_LIVE:
            return False
        task = asyncio.create_task(self._post_live(envelope, on_answer), name=f"https {self.peer_id}")
        self._live.add(task)
        task.add_done_callback(self._note_live_done)
        return True

    async def close(self) -> None:
        """Gives up what is on its way."""
        for task in self._live:
            task.cancel()
        await asyncio.gather(*self._live, return_exceptions=True)
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _note_live_done(self, task: asyncio.Task[None]) -> None:
        self._live.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("live envelope not handled", peer=self.peer_id, exc_info=error)

    async def _post_live(self, envelope: bytes, on_answer: OnAnswer) -> None:
        async with self._turn:
            try:
                answer = await self._post_once(envelope)
            except _NotNow as error:
                self._note_failure(str(error))
                return
        await on_answer(answer)

    def _tries(self) -> AsyncRetrying:
        return AsyncRetrying(
            retry=retry_if_exception_type(_NotNow), wait=_pause_seconds, stop=self._is_enough, reraise=True
        )

    def _is_enough(self, state: RetryCallState) -> bool:
        return self._stop.is_set() or (state.seconds_since_start or 0.0) + state.upcoming_sleep >= TRY_SECONDS

    async def _post_once(self, envelope: bytes) -> PeerAnswer:
        if len(envelope) > MAX_ENVELOPE_BYTES:
            return PeerAnswer(Outcome.REJECTED, "too_large", "the envelope is larger than any key provider takes")
        try:
            async with self._open().post(self._url, data=envelope, allow_redirects=False) as response:
                text = await response.content.read(MAX_ANSWER_BYTES)
                answer = _read_answer(response.status, text, response.headers.get("Retry-After", ""))
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            # ValueError: a host name that no encoding for names takes.
            raise _NotNow(_words(error)) from error
        self._note_success()
        return answer

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=1, ssl=self._context),
                timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS, connect=CONNECT_SECONDS),
                headers={"Content-Type": "application/octet-stream"},
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    def _note_failure(self, reason: str) -> None:
        if self._failed is None:
            _log.warning("peer's endpoint away", peer=self.peer_id, url=self._url, reason=reason)
        self._failed = reason

    def _note_success(self) -> None:
        if self._failed is not None:
            _log.info("peer's endpoint back", peer=self.peer_id, url=self._url)
        self._failed = None
        self._suspension_seconds = self._suspended_until = 0.0


def _read_answer(status: int, text: bytes, retry_after: str) -> PeerAnswer:
    """Raises _NotNow where the status says nothing about the envelope."""
    if 200 <= status < 300:
        return PeerAnswer(Outcome.TAKEN)
    if status in _REJECTIONS:
        return PeerAnswer(Outcome.REJECTED, _REJECTIONS[status], f"{status}: {_sentence(text)}")
    seconds = float(retry_after) if retry_after.isascii() and retry_after.isdecimal() and len(retry_after) < 5 else 0.0
    raise _NotNow(f"it answers {status}: {_sentence(text)}", seconds)


def _sentence(text: bytes) -> str:
    """The sentence in the JSON of an error, or the answer itself."""
    try:
        error = json.loads(text)["error"]
    except (ValueError, TypeError, KeyError):
        error = text.decode("utf-8", "replace")
    return printable(str(error))[:300]


def _words(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {error}")[:300]


_BACK_OFF = wait_random_exponential(multiplier=RETRY_FIRST_SECONDS, max=RETRY_LAST_SECONDS)


def _pause_seconds(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    wished = error.retry_after_seconds if isinstance(error, _NotNow) else 0.0
    return max(_BACK_OFF(state), min(wished, RETRY_LAST_SECONDS))
