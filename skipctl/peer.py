"""``skipctl peer list|check``: the state of every peer, and what is wrong with it.

The commands only read: nothing is pinned. Exit code 0 if nothing is wrong, else 1. An endpoint is requested as the
syncer reaches it, at ``GET {endpoint}/capabilities``. The sentences are in `skipbus.ctl.peer_words`.
"""

from __future__ import annotations

import argparse
import ssl
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, HTTPSHandler, ProxyHandler, build_opener

import orjson
from sqlalchemy import Connection

from skipbus.ctl.command import Commands, add_command, add_group
from skipbus.ctl.peer_words import PeerView, problems
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.errors import SealBroken
from skipbus.shared.liveness import peer_status, process_states
from skipbus.shared.protocol.announcements import Announcement, read_announcement
from skipbus.shared.protocol.system_ids import RemoteSystemIds
from skipbus.shared.settings import Settings, load_settings
from skipbus.shared.settings.peers import PeerSettings
from skipbus.shared.store import announcements, outbox, peers, pinned_identities
from skipbus.shared.store.engine import driver_errors, make_engine
from skipbus.shared.store.processes import fetch_processes
from skipbus.shared.store.stock import fetch_stock_level

ENDPOINT_TIMEOUT_SECONDS = 5.0
_MAX_ANSWER_BYTES = 256 * 1024
_SYNCER_LATE_INTERVALS = 3


def register(commands: Commands) -> None:
    """Add `peer` and its subcommands."""
    group = add_group(commands, "peer", "show the other key providers")
    add_command(group, "list", "print one line for each peer", _list)
    check = add_command(group, "check", "print what is wrong with a peer, or with all peers", _check)
    check.add_argument("system_id", nargs="?", metavar="ID", help="the peer; without it all of them")


def _list(_arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    settings = load_settings(environ)
    at_ms, faulty = now_ms(), 0
    for view in _read(settings, None):
        found = problems(view, at_ms)
        faulty += bool(found)
        print(f"{view.peer.system_id}  {_in_short(view, at_ms)}  {_verdict(found)}")
    return 1 if faulty else 0


def _check(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    settings = load_settings(environ)
    own = _own_problems(settings)
    _print(f"{settings.local_system_id} (this key provider)", own)
    at_ms, faulty = now_ms(), bool(own)
    for view in _read(settings, arguments.system_id):
        found = problems(view, at_ms)
        faulty = faulty or bool(found)
        _print(view.peer.system_id, found)
    return 1 if faulty else 0


def _print(name: str, found: Iterable[str]) -> None:
    lines = list(found)
    print(f"{name}: {'ok' if not lines else ''}".rstrip())
    for line in lines:
        print(f"  {line}")


def _in_short(view: PeerView, at_ms: int) -> str:
    row = view.row
    status = peer_status(row.last_heartbeat_ms, row.heartbeat_interval_ms, at_ms) if row else "offline"
    stock = f"  stock {view.stock}/{view.peer.stock}" if view.stock is not None else ""
    return f"{view.peer.link}  {status}{stock}"


def _verdict(found: list[str]) -> str:
    return "ok" if not found else f"{found[0]}{f' (and {len(found) - 1} more)' if len(found) > 1 else ''}"


def _read(settings: Settings, wanted: str | None) -> list[PeerView]:
    """What is known of one peer, or of all. Raises StoreUnavailable, StoreRefused, KeyringError."""
    keyring = Keyring.open(settings.keyring_dir, settings.local_system_id)
    engine = make_engine(settings.mysql, pool_size=1)
    try:
        with driver_errors(), engine.connect() as connection:
            reader = _Reader(settings, keyring, connection)
            names = reader.names() if wanted is None else [wanted]
            views = [reader.view(name) for name in names]
    finally:
        engine.dispose()
    return views


class _Reader:
    """Reads one KP's peers over one connection."""

    def __init__(self, settings: Settings, keyring: Keyring, connection: Connection) -> None:
        self._settings = settings
        self._local_id = settings.local_system_id
        self._remote_ids = RemoteSystemIds(settings.remote_system_ids, self._local_id)
        self._pins = keyring.pins
        self._connection = connection
        self._rows = {row.peer_id: row for row in peers.fetch_peer_rows(connection, self._local_id)}
        self._stored = pinned_identities.fetch_pins(connection, self._local_id)

    def names(self) -> list[str]:
        """The peers that the configuration names, and the announced or known ones that a glob matches."""
        seen = {*announcements.fetch_announcement_digests(self._connection), *self._rows}
        matching = {name for name in seen if name in self._remote_ids}
        return sorted(self._remote_ids.exact | matching | set(self._settings.peers))

    def view(self, system_id: str) -> PeerView:
        """One peer."""
        peer = self._settings.peers.get(system_id) or PeerSettings(system_id)
        announcement, fault = self._announcement(peer)
        pin = self._stored.get(system_id)
        presented = (pin.presented_key, pin.presented_ms or 0) if pin and pin.presented_key else None
        return PeerView(
            peer=peer,
            configured=system_id in self._settings.peers or system_id in self._remote_ids,
            identity=peer.identity or self._pins.get(system_id) or (pin.public_key if pin else None),
            announcement=announcement,
            announcement_fault=fault,
            presented=presented,
            row=self._rows.get(system_id),
            waiting=outbox.fetch_waiting(self._connection, self._local_id, system_id),
            stock=self._stock(peer),
            endpoint_fault=endpoint_fault(peer) if peer.endpoint else None,
        )

    def _announcement(self, peer: PeerSettings) -> tuple[Announcement | None, str | None]:
        if peer.link == "bus":
            body = announcements.fetch_bus_announcement(self._connection, self._local_id, peer.system_id)
        else:
            body = announcements.fetch_announcement(self._connection, peer.system_id)
        if body is None:
            return None, None
        try:
            announcement = read_announcement(body)
        except SealBroken as error:
            return None, str(error)
        if announcement.system_id != peer.system_id:
            return None, f"it is that of {announcement.system_id}"
        return announcement, None

    def _stock(self, peer: PeerSettings) -> int | None:
        if peer.link != "bus" or not peer.stock:
            return None
        usable_until_ms = now_ms() + self._settings.key_ttl_seconds * 500
        return fetch_stock_level(self._connection, self._local_id, peer.system_id, usable_until_ms).placed


def _own_problems(settings: Settings) -> list[str]:
    engine = make_engine(settings.mysql, pool_size=1)
    try:
        with driver_errors(), engine.connect() as connection:
            seen = fetch_processes(connection, settings.local_system_id)
    finally:
        engine.dispose()
    late_ms = now_ms() - round(max(settings.heartbeat_seconds * _SYNCER_LATE_INTERVALS, 3) * 1000)
    states = process_states(seen, late_ms)
    found = [f"Its {role} is not running." for role, state in states.items() if state == "missing"]
    if states["syncer"] not in ("ok", "missing"):
        found.append(f"Its syncer says: {states['syncer']}.")
    return found


def endpoint_fault(peer: PeerSettings) -> str | None:
    """Why the peer does not answer at its endpoint, or None."""
    try:
        answer = _ask(f"{peer.endpoint}/capabilities", peer)
        name = orjson.loads(answer).get("localSystemID")
    except HTTPError as error:
        with error:
            return f"it answers {error.code} to GET /capabilities"
    except URLError as error:
        return _connection_fault(error.reason)
    except (OSError, ssl.SSLError) as error:
        return _connection_fault(error)
    except (ValueError, AttributeError):
        return "what answers there is no key provider"
    return None if name == peer.system_id else f"{ascii(name)[:70]} answers there"


def _connection_fault(reason: object) -> str:
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"its certificate is refused ({reason.verify_message})"
    if isinstance(reason, ssl.SSLError):
        return f"TLS fails ({reason.reason or 'handshake'})"
    words = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
    return f"it cannot be reached ({words})"


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:  # noqa: ANN401 -- the library's own arguments
        """The syncer follows no redirect either."""


def _ask(url: str, peer: PeerSettings) -> bytes:
    context = ssl.create_default_context(cafile=peer.endpoint_ca_file)
    # No proxy of the environment: the syncer connects directly.
    opener = build_opener(ProxyHandler({}), HTTPSHandler(context=context), _NoRedirect())
    with opener.open(url, timeout=ENDPOINT_TIMEOUT_SECONDS) as response:
        answer: bytes = response.read(_MAX_ANSWER_BYTES)
    return answer
