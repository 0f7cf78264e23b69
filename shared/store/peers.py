"""What a KP knows of its peers: counters of keys, heartbeats, clocks, rejections. Table peers, all by primary key.

The row without a peer is the KP's own: up to which sequence number its envelopes may be numbered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, Select, and_, bindparam, func, select, update
from sqlalchemy.dialects.mysql import Insert, insert

from skipbus.shared.store.schema import PEERS as P

OWN_ROW = ""


@dataclass(frozen=True, slots=True)
class ReceivedHeartbeat:
    """What a peer's heartbeat says of it; ``clock_skew_ms`` as in ``PeerRow``."""

    peer_id: str
    number: int
    interval_ms: int
    clock_skew_ms: int = 0


@dataclass(frozen=True)
class PeerRow:
    """A peer as ``local_id`` sees it. Inbound: keys that the peer made for ``local_id``.

    ``clock_skew_ms`` is positive where the peer's clock is behind; ``last_refusal`` is what the peer said when it last
    rejected an envelope.
    """

    peer_id: str
    last_heartbeat_ms: int | None
    heartbeat_interval_ms: int
    issued: int
    retrieved: int
    expired: int
    inbound_issued: int
    inbound_retrieved: int
    inbound_expired: int
    clock_skew_ms: int | None = None
    last_refusal: str = ""
    last_refusal_ms: int | None = None
    withdrawn: int = 0
    inbound_withdrawn: int = 0


@dataclass(frozen=True, slots=True)
class PeerLiveness:
    """The part of a ``PeerRow`` that heartbeats write."""

    peer_id: str
    last_heartbeat_ms: int | None
    heartbeat_interval_ms: int
    clock_skew_ms: int | None


def _select(fields: Iterable[str]) -> Select[Any]:
    columns = [P.c[field] for field in fields]
    return select(*columns).where(P.c.local_id == bindparam("local_id"), P.c.peer_id != OWN_ROW)


_PEER_ROWS = _select(PeerRow.__dataclass_fields__)
_LIVENESS = _select(PeerLiveness.__dataclass_fields__)
_HEARTBEATS = insert(P)
_HEARTBEATS = _HEARTBEATS.on_duplicate_key_update(
    {
        name: _HEARTBEATS.inserted[name]
        for name in ("last_heartbeat_no", "last_heartbeat_ms", "heartbeat_interval_ms", "clock_skew_ms")
    }
)
_HEARTBEAT_NUMBERS = select(P.c.peer_id, P.c.last_heartbeat_no).where(
    P.c.local_id == bindparam("local_id"), P.c.peer_id.in_(bindparam("peer_ids", expanding=True))
)


def fetch_peer_rows(connection: Connection, local_id: str) -> list[PeerRow]:
    """All that is known of the peers of ``local_id``. Prefix of the primary key."""
    return [PeerRow(*row) for row in connection.execute(_PEER_ROWS, {"local_id": local_id})]


def fetch_liveness(connection: Connection, local_id: str) -> list[PeerLiveness]:
    """What heartbeats wrote of the peers of ``local_id``. Prefix of the primary key."""
    return [PeerLiveness(*row) for row in connection.execute(_LIVENESS, {"local_id": local_id})]


def add_to_counters(connection: Connection, local_id: str, peer_id: str, counts: Mapping[str, int]) -> None:
    """Adds to the named counters of ``PeerRow``. Primary key."""
    connection.execute(_adding(tuple(counts)), {"local_id": local_id, "peer_id": peer_id, **counts})


@lru_cache(maxsize=256)
def _adding(names: tuple[str, ...]) -> Insert:
    statement = insert(P)
    return statement.on_duplicate_key_update({name: P.c[name] + statement.inserted[name] for name in names})


def fetch_heartbeat_numbers(connection: Connection, local_id: str, peer_ids: Iterable[str]) -> dict[str, int]:
    """The number of the last heartbeat that was accepted of each peer. Primary key."""
    rows = connection.execute(_HEARTBEAT_NUMBERS, {"local_id": local_id, "peer_ids": list(peer_ids)})
    return {row.peer_id: row.last_heartbeat_no for row in rows}


def upsert_heartbeats(
    connection: Connection, local_id: str, heartbeats: Iterable[ReceivedHeartbeat], now_ms: int
) -> None:
    """These peers live, in the order given; one statement for all of them. Primary key."""
    rows = [
        {
            "local_id": local_id,
            "peer_id": one.peer_id,
            "last_heartbeat_no": one.number,
            "last_heartbeat_ms": now_ms,
            "heartbeat_interval_ms": one.interval_ms,
            "clock_skew_ms": _within_int(one.clock_skew_ms),
        }
        for one in heartbeats
    ]
    connection.execute(_HEARTBEATS, rows)


def upsert_clock_skew(connection: Connection, local_id: str, peer_id: str, number: int, clock_skew_ms: int) -> None:
    """What an envelope that was rejected for its date says of the peer's clock. Primary key.

    One whose number is not above the last heartbeat's is a recording, and says nothing.
    """
    skew_ms = _within_int(clock_skew_ms)
    statement = insert(P).values(local_id=local_id, peer_id=peer_id, clock_skew_ms=skew_ms)
    newer = func.if_(P.c.last_heartbeat_no < number, skew_ms, P.c.clock_skew_ms)
    connection.execute(statement.on_duplicate_key_update(clock_skew_ms=newer))


def upsert_rejection(connection: Connection, local_id: str, peer_id: str, words: str, now_ms: int) -> None:
    """What a peer said when it rejected an envelope, for the operator. Primary key."""
    fresh = {"last_refusal": words[:255], "last_refusal_ms": now_ms}
    statement = insert(P).values(local_id=local_id, peer_id=peer_id, **fresh)
    connection.execute(statement.on_duplicate_key_update(fresh))


def _within_int(milliseconds: int) -> int:
    """A peer may date its envelopes as it likes; the column holds 32 bits."""
    return max(-(2**31), min(2**31 - 1, milliseconds))


# --- the KP's own row


def fetch_last_number(connection: Connection, local_id: str) -> int:
    """Up to which number envelopes of ``local_id`` may have been numbered; locked for this transaction. Primary key."""
    statement = select(P.c.last_heartbeat_no).where(P.c.local_id == local_id, P.c.peer_id == OWN_ROW)
    return connection.execute(statement.with_for_update()).scalar() or 0


def upsert_last_number(connection: Connection, local_id: str, number: int) -> None:
    """Envelopes of ``local_id`` may be numbered up to ``number`` from now on. Primary key."""
    statement = insert(P).values(local_id=local_id, peer_id=OWN_ROW, last_heartbeat_no=number)
    connection.execute(statement.on_duplicate_key_update(last_heartbeat_no=number))


def update_last_number(connection: Connection, local_id: str, noted: int, used: int) -> None:
    """No more than ``used`` of what was ``noted`` is used; nothing where another has noted since. Primary key."""
    own = and_(P.c.local_id == local_id, P.c.peer_id == OWN_ROW, P.c.last_heartbeat_no == noted)
    connection.execute(update(P).where(own).values(last_heartbeat_no=used))
