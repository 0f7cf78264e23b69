"""Answers to encryptors: JSON bodies, and the one place where an error becomes an HTTP status.

Statuses are the draft's (Tables 3, 7 and 9). Bodies of errors are ``{"error": "<sentence>"}`` and do not say more than
the caller may know; the full reason is in the access log.
"""

from __future__ import annotations

import orjson
from aiohttp import web
from multidict import CIMultiDict

from skipbus.shared.errors import (
    CallerError,
    NoEntropy,
    Overloaded,
    PeerError,
    PeerNotReady,
    SkipbusError,
    StoreRefused,
    StoreUnavailable,
)

_JSON = "application/json; charset=utf-8"
_PLAIN = CIMultiDict({"Content-Type": _JSON, "Server": "skipbus"})
_SECRET = CIMultiDict({**_PLAIN, "Cache-Control": "no-store", "Pragma": "no-cache"})
RETRY_AFTER_SECONDS = 1

# The first matching class counts. None means the error's own sentence.
_ANSWERS: tuple[tuple[type[SkipbusError], int, str | None], ...] = (
    (CallerError, 400, None),
    (Overloaded, 503, None),
    (NoEntropy, 503, None),
    (PeerNotReady, 500, None),
    (PeerError, 500, "the key could not be read"),
    (StoreUnavailable, 500, "the key store did not answer"),
    (StoreRefused, 500, "the key store refused a statement"),
    (SkipbusError, 500, "internal error"),
)


class RouteError(SkipbusError):
    """The request names no method of the draft: 404, 405, 413, 417 or, for broken HTTP, 400."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


def json_response(value: object, status: int = 200) -> web.Response:
    """An answer without a secret."""
    return web.Response(body=orjson.dumps(value), status=status, headers=_PLAIN)


def prepared_response(body: bytes) -> web.Response:
    """An answer without a secret, from a prepared body."""
    return web.Response(body=body, headers=_PLAIN)


def secret_response(body: bytes) -> web.Response:
    """An answer with a secret: no cache may store it."""
    return web.Response(body=body, headers=_SECRET)


def error_response(error: SkipbusError, correlation_id: str) -> web.Response:
    """The status and sentence for an error."""
    status, sentence = _status_and_sentence(error)
    headers = CIMultiDict(_SECRET)
    headers["X-Request-ID"] = correlation_id
    if status == 503:
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if isinstance(error, RouteError):
        headers.update({name.replace("_", "-"): value for name, value in error.headers.items()})
    body = {"error": sentence} | getattr(error, "details", {})
    return web.Response(body=orjson.dumps(body), status=status, headers=headers)


def reason_of(error: BaseException) -> str:
    """Why a request was refused, for the log: the error's message, its notes, and those of its causes."""
    words = [str(error), *getattr(error, "__notes__", [])]
    if error.__cause__ is not None and isinstance(error.__cause__, SkipbusError):
        words.append(reason_of(error.__cause__))
    return "; ".join(words)


def _status_and_sentence(error: SkipbusError) -> tuple[int, str]:
    if isinstance(error, RouteError):
        return error.status, str(error)
    return next((status, sentence or str(error)) for kind, status, sentence in _ANSWERS if isinstance(error, kind))
