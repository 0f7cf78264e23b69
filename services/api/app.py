"""Dispatches requests: routes, the correlation id and the access log. ``http.responses`` maps errors to statuses.

Encryptors' methods are GET and have no body (draft Table 2); ``POST /sync`` is for bus peers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from urllib.parse import unquote

from aiohttp import HttpVersion10, web

from skipbus.services.api.http.access_log import Entry, log_request
from skipbus.services.api.http.responses import RouteError, error_response, reason_of
from skipbus.services.api.skip import SkipMethods
from skipbus.services.api.status import StatusPages
from skipbus.services.api.sync import PATH as SYNC_PATH
from skipbus.services.api.sync import SyncEndpoint
from skipbus.shared.errors import SkipbusError
from skipbus.shared.logging import get_logger, log_correlation_id, new_correlation_id

_log = get_logger("app")
_KEY_PREFIX = "/key/"
_HEALTH = "/health"
Handler = Callable[[Entry, str], Awaitable[web.Response]]


class Application:
    """Dispatches on the path."""

    def __init__(self, skip: SkipMethods, status: StatusPages, sync: SyncEndpoint) -> None:
        self._sync = sync
        self._get_key_by_id = skip.get_key_by_id
        self._routes: dict[str, Handler] = {
            "/capabilities": skip.get_capabilities,
            "/key": skip.get_key,
            "/entropy": skip.get_entropy,
            _HEALTH: status.get_health,
            "/status/sync": status.get_status_sync,
        }
        # While the process drains, each answer closes its connection.
        self.ends_connections = False

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The answer to one request. An error outside the error tree is a 500 with a traceback in the log."""
        correlation_id = new_correlation_id()
        log_correlation_id(correlation_id)
        entry = Entry(correlation_id, getattr(request.protocol, "caller", None))
        try:
            response = await self._dispatch(request, entry)
        except SkipbusError as error:
            entry.reason = reason_of(error)
            response = error_response(error, correlation_id)
        except Exception as error:  # noqa: BLE001 -- no detail of it may reach the caller
            _log.error("request failed", exc_info=error)
            entry.reason = f"{type(error).__name__} (see the traceback with this correlation id)"
            response = error_response(SkipbusError(), correlation_id)
        if self.ends_connections or _may_hold_another_request(request, entry):
            response.force_close()
        log_request(request, entry, response.status)
        return response

    def _dispatch(self, request: web.BaseRequest, entry: Entry) -> Awaitable[web.Response]:
        path, _, query = request.raw_path.partition("?")
        if path == SYNC_PATH:
            entry.route = path
            _check_method(request, "POST")
            return self._sync.handle(request, entry)
        handler = self._routes.get(path)
        if handler is not None:
            entry.route = path
        else:
            raw_path = _raw_path(request, path)
            path = unquote(raw_path, errors="surrogateescape")
            handler = self._routes.get(path)
            if handler is None and (not path.startswith(_KEY_PREFIX) or _is_below_a_key(raw_path)):
                raise RouteError(404, "there is no such path (see draft-cisco-skip-02, Table 2)")
            entry.route = "/key" if handler is None else path
        # Probes of orchestrators ask with HEAD; the draft's methods are GET alone.
        _check_method(request, *(("GET", "HEAD") if path == _HEALTH else ("GET",)))
        if handler is not None:
            return handler(entry, query)
        return self._get_key_by_id(entry, query, path[len(_KEY_PREFIX) :])


def _may_hold_another_request(request: web.BaseRequest, entry: Entry) -> bool:
    """Whether a proxy on the way may see the end of the request elsewhere, and so a second request inside it.

    A connection with an unexpected body is closed after its answer; one with a peer's complete envelope stays open.
    """
    return request.body_exists and not (entry.route == SYNC_PATH and request.content.at_eof())


def _raw_path(request: web.BaseRequest, path: str) -> str:
    # The absolute form, which proxies send (RFC 9112, 3.2.2), has a scheme and a host before the path.
    return path if path.startswith("/") else request.rel_url.raw_path


def _is_below_a_key(raw_path: str) -> bool:
    """Whether there is a segment behind the keyId. An escaped slash is a part of the keyId, which has none."""
    return any(raw_path.split("/", 3)[3:])


def _check_method(request: web.BaseRequest, *allowed: str) -> None:
    if request.version < HttpVersion10:
        # The parser reads a request line without a version as HTTP/0.9, which has neither status nor headers.
        raise RouteError(400, "the request is not well-formed HTTP: its first line names no version")
    if request.method not in allowed:
        raise RouteError(405, f"only {' and '.join(allowed)} is supported", Allow=", ".join(allowed))
    if request.method == "POST":
        return
    if request.body_exists:
        raise RouteError(413, "GET takes no body here")
    if request.headers.get("Expect"):
        raise RouteError(417, "no expectation is met here")
