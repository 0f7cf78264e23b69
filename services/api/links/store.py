"""The link to KPs that use the same store: a key is placed when its sealed record is committed there.

A key exists in clear only between the random numbers and the answer. It is committed together with its event, and it
is deleted, and that is committed, before it is handed out. Of several callers in one batch the first gets the key;
callers in other batches or processes wait for the row's lock and then find nothing. A record that is another KP's,
another source's, expired or damaged stays where it is. A damaged record is answered 500; the others get the same 400,
and the log says which it was.
"""

from __future__ import annotations

import functools
import secrets
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import Connection, Engine

from skipbus.services.api.entropy import new_key_id, random_bytes
from skipbus.services.api.group_commit import GroupCommit, Limits
from skipbus.services.api.links import ClaimedKey, IssuedKey, IssueRequest
from skipbus.services.api.links.sealing import Opener, Sealer, not_usable
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.crypto.sealing import KeyRecord, WrappingKey
from skipbus.shared.errors import (
    KeyNotAvailable,
    PeerNotReady,
    SealBroken,
    SkipbusError,
    StoreConflict,
    StoreUnavailable,
)
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.settings import Settings
from skipbus.shared.store.key_records import (
    claim_key_records,
    delete_key_records,
    fetch_key_record_exists,
    insert_key_records,
)
from skipbus.shared.store.outbox import TOKEN_BYTES, OutboxRow, fetch_tokens, insert_outbox_rows


class StoreLink:
    """Issues and claims keys in the store of this process, in one queue each."""

    def __init__(self, settings: Settings, keyring: Keyring, directory: PeerDirectory, engine: Engine) -> None:
        self._directory = directory
        self._sealer = Sealer(settings.local_system_id, keyring.identity, directory)
        self._opener = Opener(keyring, directory)
        limits = Limits(settings.max_batch, settings.max_queue, settings.request_timeout_seconds)
        issue = functools.partial(IssueBatch, self._sealer, settings.key_ttl_seconds)
        claim = functools.partial(ClaimBatch, self._opener)
        self._issue = GroupCommit("issue", issue, engine, limits)
        self._claim = GroupCommit("claim", claim, engine, limits)

    async def issue(self, target_id: str, size_bits: int, correlation_id: str) -> IssuedKey:
        """A fresh key whose record is committed. Raises PeerNotReady, NoEntropy, Overloaded, StoreUnavailable."""
        if self._directory.get(target_id) is None:
            raise not_usable(self._directory, target_id)
        return await self._issue.submit(IssueRequest(target_id, size_bits, correlation_id))

    async def claim(self, source_id: str, key_id: bytes, correlation_id: str) -> ClaimedKey:
        """The key, deleted from the store. Raises KeyNotAvailable, SealBroken, Overloaded, StoreUnavailable."""
        return await self._claim.submit(ClaimRequest(key_id, source_id, correlation_id))

    def forget_ended(self, at_ms: int) -> None:
        """Drops wrapping keys whose epoch's private half is destroyed at ``at_ms`` (UTC)."""
        self._sealer.forget_ended(at_ms)
        self._opener.forget_ended(at_ms)

    async def close(self) -> None:
        """Finishes what is being committed."""
        await self._issue.close()
        await self._claim.close()


class IssueBatch:
    """One transaction that places several keys."""

    def __init__(self, sealer: Sealer, key_ttl_seconds: int, requests: Sequence[IssueRequest]) -> None:
        self._sealer = sealer
        self._ttl_ms = key_ttl_seconds * 1000
        self._requests = requests
        # The first keyId and the answers of each attempt. The server may finish an interrupted commit after the retry
        # has begun, so every attempt is kept.
        self._runs: list[tuple[bytes, list[IssuedKey | SkipbusError]]] = []

    def run(self, connection: Connection) -> Sequence[IssuedKey | SkipbusError]:
        """Makes, seals and inserts a key for each request; PeerNotReady stands in the place of those that cannot."""
        at_ms = now_ms()
        wrapping_keys = self._wrapping_keys(connection, at_ms)
        answers: list[IssuedKey | SkipbusError] = []
        records: list[KeyRecord] = []
        for request in self._requests:
            wrapping_key = wrapping_keys[request.target_id]
            if isinstance(wrapping_key, PeerNotReady):
                answers.append(wrapping_key)
                continue
            record, issued = make_key(request, wrapping_key, at_ms + self._ttl_ms)
            records.append(record)
            answers.append(issued)
        if records:
            self._runs.append((records[0].key_id, answers))
            insert_key_records(connection, records)
            insert_outbox_rows(connection, _issued_events(records, at_ms))
        return answers

    def committed(self, connection: Connection) -> Sequence[IssuedKey | SkipbusError] | None:
        """Whether the keys are there proves it: no other process knows their keyIds."""
        return next((answers for key_id, answers in self._runs if fetch_key_record_exists(connection, key_id)), None)

    def _wrapping_keys(self, connection: Connection, at_ms: int) -> dict[str, WrappingKey | PeerNotReady]:
        found: dict[str, WrappingKey | PeerNotReady] = {}
        for target_id in {request.target_id for request in self._requests}:
            try:
                found[target_id] = self._sealer.wrapping_key(connection, target_id, at_ms)
            except PeerNotReady as error:
                found[target_id] = error
        return found


def make_key(request: IssueRequest, wrapping_key: WrappingKey, expires_ms: int) -> tuple[KeyRecord, IssuedKey]:
    """A fresh key, sealed and in clear. It expires at ``expires_ms`` (UTC) at the latest. Raises NoEntropy."""
    key_id, key = new_key(request.size_bits)
    # A record must not outlive the private half that opens it.
    record = wrapping_key.seal(key_id, key, min(expires_ms, wrapping_key.expires_ms), request.correlation_id)
    return record, IssuedKey(key_id.hex(), key.hex())


def new_key(size_bits: int) -> tuple[bytes, bytes]:
    """A fresh keyId and key (draft 4.2.1). Raises NoEntropy."""
    return new_key_id(), random_bytes(size_bits // 8)


def _issued_events(records: Iterable[KeyRecord], at_ms: int) -> list[OutboxRow]:
    items: defaultdict[tuple[str, str], list[list[object]]] = defaultdict(list)
    for r in records:
        items[r.source_id, r.target_id].append([r.key_id, r.size_bits, r.expires_ms, r.correlation_id])
    return [OutboxRow.of(*pair, EnvelopeType.KEY_ISSUED, of_pair, at_ms) for pair, of_pair in items.items()]


def _retrieved_events(records: Iterable[KeyRecord], at_ms: int) -> list[OutboxRow]:
    items: defaultdict[tuple[str, str], list[list[object]]] = defaultdict(list)
    for r in records:
        items[r.target_id, r.source_id].append([r.key_id, at_ms, r.correlation_id])
    return [OutboxRow.of(*pair, EnvelopeType.KEY_RETRIEVED, of_pair, at_ms) for pair, of_pair in items.items()]


class ClaimRequest(NamedTuple):
    """The key ``key_id`` that ``source_id`` issued for this KP."""

    key_id: bytes
    source_id: str
    correlation_id: str


@dataclass(frozen=True, slots=True)
class _ClaimRun:
    """What one run would have committed: its token, the keys it deletes, and its answers."""

    token: bytes
    key_ids: Collection[bytes]
    answers: Sequence[ClaimedKey | SkipbusError]


class ClaimBatch:
    """One transaction that hands out several keys."""

    def __init__(self, opener: Opener, requests: Sequence[ClaimRequest]) -> None:
        self._opener = opener
        self._requests = requests
        self._runs: list[_ClaimRun] = []
        self._in_doubt: set[bytes] = set()

    def run(self, connection: Connection) -> Sequence[ClaimedKey | SkipbusError]:
        """Locks, opens and deletes the records; an error stands in the place of those that cannot.

        Raises StoreConflict where fewer rows were deleted than keys would be handed out.
        """
        at_ms = now_ms()
        found = claim_key_records(connection, {request.key_id for request in self._requests})
        mine = {i: r for i, r in found.items() if r.target_id == self._opener.local_id and r.expires_ms > at_ms}
        self._opener.load(connection, {record.wrapping_key_id for record in mine.values()})
        claimed: dict[bytes, KeyRecord] = {}
        answers = [self._claim(request, found, mine, claimed) for request in self._requests]
        if claimed:
            self._delete(connection, claimed, answers, at_ms)
        else:
            connection.rollback()
        return answers

    def committed(self, connection: Connection) -> Sequence[ClaimedKey | SkipbusError] | None:
        """The token in the outbox proves it, since a run inserts it only after its deletion."""
        found = fetch_tokens(connection, [run.token for run in self._runs])
        for run in self._runs:
            if run.token in found:
                return run.answers
            self._in_doubt.update(run.key_ids)
        return None

    def _delete(
        self,
        connection: Connection,
        claimed: dict[bytes, KeyRecord],
        answers: Sequence[ClaimedKey | SkipbusError],
        at_ms: int,
    ) -> None:
        if delete_key_records(connection, list(claimed)) != len(claimed):
            # Two nodes of a cluster can lock one row each; only what this transaction deletes may be handed out.
            raise StoreConflict("a key was deleted by another transaction")
        token = secrets.token_bytes(TOKEN_BYTES)
        first, *rest = _retrieved_events(claimed.values(), at_ms)
        insert_outbox_rows(connection, [first._replace(token=token), *rest])
        self._runs.append(_ClaimRun(token, claimed.keys(), answers))

    def _claim(
        self,
        request: ClaimRequest,
        found: dict[bytes, KeyRecord],
        mine: dict[bytes, KeyRecord],
        claimed: dict[bytes, KeyRecord],
    ) -> ClaimedKey | SkipbusError:
        record = mine.get(request.key_id)
        if record is None or record.source_id != request.source_id or request.key_id in claimed:
            return self._refusal(request, found.get(request.key_id))
        try:
            key = self._opener.open(record)
        except SealBroken as error:
            return error
        claimed[request.key_id] = record
        return ClaimedKey(key.hex(), record.correlation_id)

    def _refusal(self, request: ClaimRequest, record: KeyRecord | None) -> SkipbusError:
        if record is None:
            if request.key_id in self._in_doubt:
                # Its commit was interrupted and it is gone now: by this process or by another one, which is not known.
                return StoreUnavailable("the connection to the store broke while the key was handed out")
            return not_available("unknown, expired and zeroized, or given out already")
        if record.target_id != self._opener.local_id:
            return not_available(f"the key is for key provider {record.target_id}")
        if record.source_id != request.source_id:
            return not_available(f"the key is from key provider {record.source_id}")
        return not_available("given out just now" if record.expires_ms > now_ms() else "expired")


def not_available(reason: str) -> KeyNotAvailable:
    """The one sentence for every caller; ``reason`` is for the log only."""
    error = KeyNotAvailable("no key with this keyId waits here for this remoteSystemID", parameter="keyId")
    error.add_note(reason)
    return error
