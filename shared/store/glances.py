"""What each process looks up once a second, in one packet for each look (``skipbus.shared.glance``).

Every look is by primary key, and counts or reads rows of one KP only. As in ``packets``, values stand in the statements
as integers and hexadecimal literals alone. What has to be read before something is changed is locked and read by the
modules that change it: a look says only whether that is worth while.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pymysql.connections import Connection

from skipbus.shared.store.announcements import Digests
from skipbus.shared.store.literals import name
from skipbus.shared.store.peers import OWN_ROW, PeerRow
from skipbus.shared.store.processes import ProcessSeen
from skipbus.shared.store.results import Rows

_PEER_ROW = ", ".join(PeerRow.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Due:
    """What there is for a janitor to do: a record of its KP has expired, and which announcement of it is stored."""

    expired: bool
    digest: bytes | None


def look_at_view(
    connection: Connection, local_id: str, *, bus: bool
) -> tuple[Digests, list[PeerRow], list[ProcessSeen]]:
    """For an api. One row a KP, one a peer and one a process."""
    seen = f"SELECT role, instance, seen_ms, detail FROM processes WHERE local_id = {name(local_id)}"
    peers, processes, *digests = _ask(connection, [_of_peers(_PEER_ROW, local_id), seen, *_digests(local_id, bus=bus)])
    return _read_digests(digests), [PeerRow(*row) for row in peers], [ProcessSeen(*row) for row in processes]


def look_at_due(connection: Connection, local_id: str, now_ms: int) -> Due:
    """For a janitor. One row of the key records, one announcement."""
    expired, digests = _ask(
        connection,
        [
            f"SELECT 1 FROM key_records WHERE target_id = {name(local_id)} AND expires_ms <= {now_ms:d} LIMIT 1",
            f"SELECT digest FROM announcements WHERE system_id = {name(local_id)}",
        ],
    )
    return Due(bool(expired), digests[0][0] if digests else None)


def _of_peers(columns: str, local_id: str) -> str:
    return f"SELECT {columns} FROM peers WHERE local_id = {name(local_id)} AND peer_id <> {name(OWN_ROW)}"


def _digests(local_id: str, *, bus: bool) -> list[str]:
    sent = f"SELECT system_id, digest FROM bus_announcements WHERE local_id = {name(local_id)}"
    return ["SELECT system_id, digest FROM announcements", *([sent] if bus else [])]


def _read_digests(results: Sequence[Rows]) -> Digests:
    found, *sent = results
    return Digests(dict(found), dict(sent[0]) if sent else {})


def _ask(connection: Connection, questions: Sequence[str]) -> list[Rows]:
    """The rows that each question gives."""
    results: list[Rows] = []
    with connection.cursor() as cursor:
        cursor.execute(";".join(questions))
        results.append(cursor.fetchall())
        while cursor.nextset():
            results.append(cursor.fetchall())
    return results
