"""Stock: keys placed at a peer ahead of need. Tables ``stock`` (the source's copies) and ``stock_held`` (the target's).

``stock`` is clustered by peer and expiry: the oldest usable keys of a peer are one range of the primary key. A claim
skips rows that another process has locked, because any key will do. A row counts as placed once the peer has
acknowledged the outbox row with the same token. ``stock_held`` names the records of a target that are stock of a
source: they were not issued to anybody yet. Transactions are the callers'.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Select, bindparam, delete, func, insert, select, text, update

from skipbus.shared.crypto.sealing import KeyRecord
from skipbus.shared.store.listed import delete_listed
from skipbus.shared.store.schema import STOCK as S
from skipbus.shared.store.schema import STOCK_HELD as H


@dataclass(frozen=True, slots=True)
class StockLevel:
    """How many usable keys are at a peer, and how many more are on their way to it."""

    placed: int = 0
    in_flight: int = 0

    @property
    def total(self) -> int:
        """Both together."""
        return self.placed + self.in_flight


@dataclass(frozen=True, slots=True)
class StockRow:
    """The source's copy of a key in stock; ``placed`` once the peer has acknowledged it."""

    key_id: bytes
    expires_ms: int
    token: bytes
    placed: bool


_CLAIM = (
    select(S.c.key_id, S.c.size_bits, S.c.expires_ms, S.c.wrapping_key_id, S.c.nonce, S.c.sealed)
    .with_hint(S, "FORCE INDEX (PRIMARY)")
    .where(
        S.c.local_id == bindparam("local_id"),
        S.c.peer_id == bindparam("peer_id"),
        S.c.expires_ms >= bindparam("usable_until_ms"),
        S.c.placed_ms.is_not(None),
    )
    .order_by(S.c.expires_ms)
    .limit(bindparam("count"))
    .with_for_update(skip_locked=True)
)
_LEVEL = select(func.count(), func.count(S.c.placed_ms)).where(
    S.c.local_id == bindparam("local_id"),
    S.c.peer_id == bindparam("peer_id"),
    S.c.expires_ms >= bindparam("usable_until_ms"),
)
_OLDEST = (
    select(S.c.peer_id, func.min(S.c.expires_ms)).where(S.c.local_id == bindparam("local_id")).group_by(S.c.peer_id)
)
# SQLAlchemy has no ORDER BY for DELETE.
_DELETE_EXPIRED_HELD = text(
    "DELETE FROM stock_held WHERE local_id = :local_id AND expires_ms <= :now_ms ORDER BY expires_ms LIMIT :rows"
)
_HELD = select(H.c.source_id, func.count()).where(H.c.local_id == bindparam("local_id")).group_by(H.c.source_id)


# --- the source's copies: made, given out and counted by the api


def insert_stock(
    connection: Connection, local_id: str, peer_id: str, token: bytes, copies: Iterable[KeyRecord]
) -> None:
    """Stores the copies of new stock, which the outbox row with this token carries to the peer."""
    connection.execute(
        insert(S),
        [
            {
                "local_id": local_id,
                "peer_id": peer_id,
                "expires_ms": copy.expires_ms,
                "key_id": copy.key_id,
                "size_bits": copy.size_bits,
                "wrapping_key_id": copy.wrapping_key_id,
                "nonce": copy.nonce,
                "sealed": copy.sealed,
                "token": token,
            }
            for copy in copies
        ],
    )


def claim_stock(
    connection: Connection, local_id: str, peer_id: str, usable_until_ms: int, count: int
) -> list[KeyRecord]:
    """The placed keys that expire first of those that live until ``usable_until_ms``, locked. Primary key.

    A copy's source and target are ``local_id``; it opens with the peer's id as its context.
    """
    wanted = {"local_id": local_id, "peer_id": peer_id, "usable_until_ms": usable_until_ms, "count": count}
    return [
        KeyRecord(key_id, local_id, local_id, size_bits, expires_ms, wrapping_key_id, nonce, sealed, "")
        for key_id, size_bits, expires_ms, wrapping_key_id, nonce, sealed in connection.execute(_CLAIM, wanted)
    ]


def delete_stock(connection: Connection, key_ids: Sequence[bytes]) -> int:
    """Deletes copies that the caller has locked; how many there were. Index stock_key_id.

    By the primary key the server may read rows of the same expiry that other processes have locked.
    """
    return delete_listed(connection, S.name, "stock_key_id", "key_id", key_ids)


def fetch_stock_level(connection: Connection, local_id: str, peer_id: str, usable_until_ms: int) -> StockLevel:
    """Counts a peer's stock that lives until ``usable_until_ms``. A range of the primary key."""
    wanted = {"local_id": local_id, "peer_id": peer_id, "usable_until_ms": usable_until_ms}
    total, placed = connection.execute(_LEVEL, wanted).one()
    return StockLevel(placed, total - placed)


# --- the source's copies: what the syncer learns from the peer and from the clock


def update_stock_placed(connection: Connection, tokens: Collection[bytes], now_ms: int) -> None:
    """The peer has stored what went under these tokens. Index stock_token."""
    connection.execute(update(S).where(S.c.token.in_(tokens), S.c.placed_ms.is_(None)).values(placed_ms=now_ms))


def fetch_oldest_stock(connection: Connection, local_id: str) -> dict[str, int]:
    """The peers that there is stock for, and when the first key of each expires (UTC ms). Prefix of the primary key."""
    return dict(connection.execute(_OLDEST, {"local_id": local_id}).all())


def claim_old_stock(connection: Connection, local_id: str, peer_id: str, before_ms: int, limit: int) -> list[StockRow]:
    """The oldest that expires before ``before_ms``, locked; what is being given out is skipped. Primary key."""
    statement = (
        _stock_rows()
        .where(S.c.local_id == local_id, S.c.peer_id == peer_id, S.c.expires_ms < before_ms)
        .order_by(S.c.expires_ms, S.c.key_id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return [StockRow(*row) for row in connection.execute(statement)]


def claim_stock_of_tokens(connection: Connection, local_id: str, tokens: Collection[bytes]) -> list[StockRow]:
    """What went under these tokens and is not placed, locked. Index stock_token."""
    statement = (
        _stock_rows()
        .with_hint(S, "FORCE INDEX (stock_token)")
        .where(S.c.token.in_(tokens), S.c.local_id == local_id, S.c.placed_ms.is_(None))
        .with_for_update()
    )
    return [StockRow(*row) for row in connection.execute(statement)]


def delete_stock_of_peer(connection: Connection, local_id: str, peer_id: str) -> int:
    """Drops all copies for a peer. Returns how many. Prefix of the primary key."""
    return connection.execute(delete(S).where(S.c.local_id == local_id, S.c.peer_id == peer_id)).rowcount


def _stock_rows() -> Select[bytes, int, bytes, bool]:
    return select(S.c.key_id, S.c.expires_ms, S.c.token, S.c.placed_ms.is_not(None))


# --- the target's list


def insert_stock_held(connection: Connection, local_id: str, source_id: str, records: Iterable[KeyRecord]) -> None:
    """Notes that these records are stock of their source. One that is noted already stays as it is."""
    rows = [
        {"local_id": local_id, "source_id": source_id, "key_id": record.key_id, "expires_ms": record.expires_ms}
        for record in records
    ]
    connection.execute(insert(H).prefix_with("IGNORE"), rows)


def delete_stock_held(connection: Connection, local_id: str, source_id: str, key_ids: Sequence[bytes]) -> int:
    """These are stock no longer: given out, or taken back. Returns how many were. Primary key."""
    return delete_listed(connection, H.name, "PRIMARY", "key_id", key_ids, local_id=local_id, source_id=source_id)


def fetch_held_counts(connection: Connection, local_id: str) -> dict[str, int]:
    """How much stock of each source waits here. Prefix of the primary key."""
    return dict(connection.execute(_HELD, {"local_id": local_id}).all())


def delete_expired_held(connection: Connection, local_id: str, now_ms: int, limit: int) -> int:
    """Forgets which records were a peer's stock, once they have expired. Index stock_held_expires."""
    return connection.execute(_DELETE_EXPIRED_HELD, {"local_id": local_id, "now_ms": now_ms, "rows": limit}).rowcount
