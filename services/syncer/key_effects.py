"""What envelopes about a bus peer's keys do to the store, each in the transaction that it is handled in.

A record is stored only if nothing stands under its keyId yet, and never after its withdrawal, in whichever order the
two arrive. Stock counts as issued when its source says that it was given out, not when it is placed.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection

from skipbus.services.syncer.payloads import Complaint, Events
from skipbus.services.syncer.placed_keys import MAX_LIFETIME_MS, PlacedKeys
from skipbus.services.syncer.stock import drop_refused_stock
from skipbus.shared.crypto.epochs import MAX_CLOCK_SKEW_MS
from skipbus.shared.crypto.sealing import SealedWrappingKey
from skipbus.shared.logs import get_logger
from skipbus.shared.protocol.envelopes import Header
from skipbus.shared.store import key_records, outbox, peers, stock, withdrawn_keys, wrapping_keys
from skipbus.shared.store.outbox import KEY_PLACED, KEY_STOCKED, EnvelopeRow

_log = get_logger("stock")
_TRUSTED_SECONDS = 30.0
_MAX_TRUSTED = 4_096


@dataclass(slots=True)
class Aftermath:
    """What other processes of this KP are told once the transaction is committed."""

    stored: list[bytes] = field(default_factory=list)
    """Tokens of keys on demand that the peer has stored."""
    refused: list[bytes] = field(default_factory=list)
    """Tokens of keys on demand whose envelope the peer has refused."""
    arrived: list[bytes] = field(default_factory=list)
    """keyIds of keys on demand that are here now."""
    stock_changed: bool = False


class KnownWrappingKeys:
    """Wrapping keys that this process has stored a moment ago: every envelope brings those it needs."""

    def __init__(self) -> None:
        self._known: dict[SealedWrappingKey, float] = {}

    def missing(self, wrapping_keys: Iterable[SealedWrappingKey]) -> list[SealedWrappingKey]:
        """Those that must be stored, or compared with what is stored."""
        since = time.monotonic() - _TRUSTED_SECONDS
        return [one for one in wrapping_keys if self._known.get(one, since) <= since]

    def note(self, wrapping_keys: Iterable[SealedWrappingKey]) -> None:
        """These are committed."""
        if len(self._known) > _MAX_TRUSTED:
            self._known.clear()
        self._known.update(dict.fromkeys(wrapping_keys, time.monotonic()))


class KeyEffects:
    """One transaction's part that deals with keys of bus peers."""

    def __init__(
        self,
        connection: Connection,
        local_id: str,
        now_ms: int,
        known: KnownWrappingKeys,
        aftermath: Aftermath | None = None,
    ) -> None:
        """An ``aftermath`` that is given is that of transactions before this one, and is added to."""
        self._connection = connection
        self._local_id = local_id
        self._now_ms = now_ms
        self._known = known
        self.aftermath = aftermath or Aftermath()
        self.stored_wrapping_keys: list[SealedWrappingKey] = []

    def store(self, header: Header, placed: PlacedKeys) -> int | None:
        """Stores what a peer has placed here; how many keys count as issued, None where a keyId exists already."""
        records = placed.key_records(header)
        key_ids = [record.key_id for record in records]
        if key_records.fetch_known_key_ids(self._connection, key_ids):
            return None
        missing = self._known.missing(placed.sealed_wrapping_keys(header))
        if missing and not self._store_wrapping_keys(missing):
            return None
        self.stored_wrapping_keys += missing
        withdrawn = withdrawn_keys.fetch_withdrawn_keys(self._connection, self._local_id, header.sender, key_ids)
        wanted = [record for record in records if record.key_id not in withdrawn]
        if not wanted:
            return 0
        key_records.insert_key_records(self._connection, wanted)
        if placed.stock:
            stock.insert_stock_held(self._connection, self._local_id, header.sender, wanted)
            return 0
        self.aftermath.arrived += [record.key_id for record in wanted]
        return len(wanted)

    def _store_wrapping_keys(self, missing: Sequence[SealedWrappingKey]) -> bool:
        """False where another one stands under one of the ids, which then stays as it is.

        Acknowledging keys whose wrapping key is not the one that they were sealed under would lose them.
        """
        wrapping_keys.insert_wrapping_keys(self._connection, missing)
        stored = wrapping_keys.fetch_sealed_wrapping_keys(self._connection, [w.wrapping_key_id for w in missing])
        return set(stored) == set(missing)

    def release_stock(self, header: Header, events: Events) -> None:
        """The source has given these out of its stock."""
        key_ids = [entry[0] for entry in events.entries]
        stock.delete_stock_held(self._connection, self._local_id, header.sender, key_ids)

    def withdraw(self, header: Header, events: Events) -> int:
        """The source takes these back; how many of them were issued on demand and still here."""
        latest_ms = self._now_ms + MAX_LIFETIME_MS + MAX_CLOCK_SKEW_MS
        keys = [(entry[0], min(entry[1], latest_ms)) for entry in events.entries]
        key_ids = [key_id for key_id, _ in keys]
        withdrawn_keys.insert_withdrawn_keys(self._connection, self._local_id, header.sender, keys)
        held = stock.delete_stock_held(self._connection, self._local_id, header.sender, key_ids)
        deleted = key_records.delete_key_records_of_source(self._connection, self._local_id, header.sender, key_ids)
        return max(0, deleted - held)

    def drop_stock(self, peer_id: str, reason: str) -> None:
        """The peer can open nothing of what is placed there: all of it, and what is on its way.

        In one transaction, however much it is: an operator's mishap, and not something that a peer gains by.
        """
        outbox.delete_stocked_rows(self._connection, self._local_id, peer_id)
        count = stock.delete_stock_of_peer(self._connection, self._local_id, peer_id)
        if count:
            self.aftermath.stock_changed = True
            _log.warning("stock dropped, the peer cannot open it", peer=peer_id, count=count, reason=reason)

    def acknowledge(self, peer_id: str, numbers: Collection[int], max_keys: int) -> tuple[int, bool]:
        """A bus peer has the keys of these envelopes; how many on demand are issued by that, and whether there are
        rows left, which have more than ``max_keys`` keys together with those that were dealt with.
        """
        found = outbox.fetch_envelope_rows(self._connection, self._local_id, peer_id, numbers)
        rows = _first_rows(found, max_keys)
        if not rows:
            return 0, False
        outbox.delete_rows(self._connection, [row.id for row in rows])
        stocked = [row.token for row in rows if row.type == KEY_STOCKED and row.token]
        if stocked:
            stock.update_stock_placed(self._connection, stocked, self._now_ms)
            self.aftermath.stock_changed = True
        placed = [row for row in rows if row.type == KEY_PLACED]
        self.aftermath.stored += [row.token for row in placed if row.token]
        return sum(row.items for row in placed), len(rows) < len(found)

    def hear_refusal(self, peer_id: str, complaint: Complaint) -> None:
        """A peer has refused an envelope: kept for the operator, and told to whoever waits for its keys."""
        told = f"{complaint.reason}: {complaint.explanation}"
        peers.upsert_rejection(self._connection, self._local_id, peer_id, told, self._now_ms)
        rows = outbox.fetch_envelope_rows(self._connection, self._local_id, peer_id, [complaint.number])
        self.aftermath.refused += [row.token for row in rows if row.type == KEY_PLACED and row.token]
        stocked = {row.id: row.token for row in rows if row.type == KEY_STOCKED and row.token}
        # These very keys will never be taken; without them the stock is filled with others.
        if complaint.reason == "key_exists" and stocked:
            drop_refused_stock(self._connection, self._local_id, peer_id, stocked, self._now_ms)
            self.aftermath.stock_changed = True


def _first_rows(rows: Sequence[EnvelopeRow], max_keys: int) -> list[EnvelopeRow]:
    """As many as have ``max_keys`` keys, one at least."""
    taken, keys = list[EnvelopeRow](), 0
    for row in rows:
        if taken and keys + row.items > max_keys:
            break
        taken.append(row)
        keys += row.items
    return taken
