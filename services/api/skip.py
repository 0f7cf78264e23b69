"""The draft's methods, one coroutine each (Table 2)."""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from aiohttp import web

from skipbus.services.api.entropy import random_bytes
from skipbus.services.api.http import parameters
from skipbus.services.api.http.access_log import Entry
from skipbus.services.api.http.responses import prepared_response, secret_response
from skipbus.services.api.links import Link
from skipbus.shared.errors import CallerError
from skipbus.shared.protocol.system_ids import RemoteSystemIds
from skipbus.shared.settings import Settings

# What the earlier server says; routers show it to their operators (16 bytes are safe everywhere, draft 4.1).
ALGORITHM = "pqc"
_KEY_BODY = b'{"keyId":"%b","key":"%b"}'


class SkipMethods:
    """Answers encryptors. Which link leads to a key provider is all that it knows of stores and buses."""

    def __init__(self, settings: Settings, store: Link, links: Mapping[str, Link]) -> None:
        """``links`` are those to certain key providers; ``store`` leads to all others."""
        self._peers = settings.peers
        self._store = store
        self._links = links
        self._remote_ids = RemoteSystemIds(settings.remote_system_ids, settings.local_system_id)
        self._capabilities = orjson.dumps(
            {
                "entropy": True,
                "key": True,
                "algorithm": ALGORITHM,
                "localSystemID": settings.local_system_id,
                "remoteSystemID": list(settings.remote_system_ids),
            }
        )

    async def get_capabilities(self, _entry: Entry, _query: str) -> web.Response:
        """``GET /capabilities`` (draft 4.1). Needs nothing behind it: routers ask after every error."""
        return prepared_response(self._capabilities)

    async def get_key(self, entry: Entry, query: str) -> web.Response:
        """``GET /key`` (draft 4.2): a fresh key, placed at the remote KP before it is answered."""
        target = entry.remote_system_id = parameters.remote_system_id(query, self._remote_ids)
        self._check_caller(entry, target)
        size_bits = parameters.key_size_bits(query)
        issued = await self._links.get(target, self._store).issue(target, size_bits, entry.correlation_id)
        entry.key_id = issued.key_id
        return secret_response(_KEY_BODY % (issued.key_id.encode(), issued.key.encode()))

    async def get_key_by_id(self, entry: Entry, query: str, key_id: str) -> web.Response:
        """``GET /key/{keyId}`` (draft 4.2): the key that the remote KP issued, once."""
        wanted = parameters.key_id(key_id)
        entry.key_id = key_id
        source = entry.remote_system_id = parameters.remote_system_id(query, self._remote_ids)
        self._check_caller(entry, source)
        claimed = await self._links.get(source, self._store).claim(source, wanted, entry.correlation_id)
        entry.issue_correlation_id = claimed.issue_correlation_id
        return secret_response(_KEY_BODY % (key_id.encode(), claimed.key.encode()))

    async def get_entropy(self, _entry: Entry, query: str) -> web.Response:
        """``GET /entropy`` (draft 4.3): random bytes that are used for nothing else."""
        bits = parameters.entropy_size_bits(query)
        random = random_bytes(bits // 8).hex().upper()
        return secret_response(b'{"randomStr":"%b","minentropy":%d}' % (random.encode(), bits))

    def _check_caller(self, entry: Entry, remote_system_id: str) -> None:
        """Raises CallerError when the configuration does not allow this caller this remoteSystemID."""
        caller, peer = entry.caller, self._peers.get(remote_system_id)
        allowed = caller is None or caller.may_ask_for(remote_system_id)
        # A peer's own list is for callers who have proved a name: one on the plain port has none.
        if peer is not None and not peer.allows(() if caller is None else caller.names):
            allowed = False
        if not allowed:
            raise CallerError("remoteSystemID is not one that this client may ask for", parameter="remoteSystemID")
