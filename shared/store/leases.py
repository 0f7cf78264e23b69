"""Leases: one row for each thing that only one of several processes does. All by primary key.

``renewals`` grows with every renewal, so a reader sees by its own clock how long a holder has been silent. No process
has to trust another host's clock.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, bindparam, select, update
from sqlalchemy.dialects.mysql import insert

from skipbus.shared.store.schema import LEASES as T


class Lease(NamedTuple):
    """Who has it, and how often it was renewed. A lease that was given back has an empty holder."""

    holder: str
    renewals: int


_FETCH = select(T.c.holder, T.c.renewals).where(T.c.name == bindparam("lease"))
_INSERT = insert(T).values(name=bindparam("lease"), holder="", renewals=0).prefix_with("IGNORE")
_CHANGE = (
    update(T)
    .where(T.c.name == bindparam("lease"), T.c.holder == bindparam("before"))
    .values(holder=bindparam("after"), renewals=T.c.renewals + 1)
)
_TAKE_OVER = _CHANGE.where(T.c.renewals == bindparam("seen"))


def fetch_lease(connection: Connection, name: str) -> Lease | None:
    """The lease, None where nobody has ever had it."""
    row = connection.execute(_FETCH, {"lease": name}).first()
    return None if row is None else Lease(row.holder, row.renewals)


def insert_lease(connection: Connection, name: str) -> Lease:
    """Makes a lease that nobody holds, unless another process makes it first: then it is not what is returned."""
    connection.execute(_INSERT, {"lease": name})
    return Lease("", 0)


def renew_lease(connection: Connection, name: str, holder: str) -> bool:
    """Whether ``holder`` has it still. The transaction must be committed for that to count."""
    return connection.execute(_CHANGE, {"lease": name, "before": holder, "after": holder}).rowcount == 1


def take_over_lease(connection: Connection, name: str, holder: str, seen: Lease) -> bool:
    """Makes ``holder`` the holder where the lease is as it was seen; whether it was. To be committed as well."""
    wanted = {"lease": name, "before": seen.holder, "seen": seen.renewals, "after": holder}
    return connection.execute(_TAKE_OVER, wanted).rowcount == 1


def give_back_lease(connection: Connection, name: str, holder: str) -> None:
    """Makes the lease free, if ``holder`` has it."""
    connection.execute(_CHANGE, {"lease": name, "before": holder, "after": ""})
