"""The target's side: claims a key record, opens it, and hands it out once.

The record is deleted, and that is committed, before the answer leaves. Of several callers in one batch the first
gets the key; callers in other batches or processes wait for the row's lock and then find nothing. A record that
is another KP's, another source's, expired or damaged stays where it is. The caller is told the same for all of
these but the last; the log says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from skipbus.services.api.commit_tokens import CommitTokens
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.crypto.sealing import KeyRecord, SealedWrappingKey, WrappingKey, open_wrapping_key
from skipbus.shared.errors import KeyNotAvailable, KeyringError, SealBroken, SkipbusError, StoreUnavailable
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.store.keys import (
    commit_claimed,
    end_without_change,
    fetch_for_claim,
    fetch_wrapping_keys,
)
from skipbus.shared.store.packets import OutboxRow
from skipbus.shared.store.steps import Steps


@dataclass(frozen=True, slots=True)
class ClaimRequest:
    """The key ``key_id`` that ``source_id`` issued for this KP."""

    key_id: bytes
    source_id: str
    correlation_id: str


@dataclass(frozen=True, slots=True, repr=False)
class ClaimedKey:
    """A key in lower-case hex, gone from the store, and the correlation id of the request that issued it."""

    key: str
    issued_as: str


def not_available(reason: str) -> KeyNotAvailable:
    """The one sentence for every caller; ``reason`` is for the log only."""
    error = KeyNotAvailable("no key with this keyId waits here for this remoteSystemID", parameter="keyId")
    error.add_note(reason)
    return error


def _again(error: SealBroken) -> SealBroken:
    # Each caller gets an error of its own: raising one writes into it.
    copy = SealBroken(str(error))
    copy.__cause__ = error.__cause__
    return copy


class Opener:
    """The opened wrapping keys of one lane, kept until their epoch's private half is destroyed."""

    def __init__(self, keyring: Keyring, directory: PeerDirectory) -> None:
        self.local_id = keyring.system_id
        self._keyring = keyring
        self._directory = directory
        self._opened: dict[bytes, WrappingKey] = {}

    def load(self, wrapping_key_ids: Iterable[bytes]) -> Steps[dict[bytes, SealBroken]]:
        """Fetches and opens those that are not open yet; those that do not open, with the reason."""
        missing = {i for i in wrapping_key_ids if i not in self._opened}
        broken: dict[bytes, SealBroken] = {}
        if missing:
            found = yield from fetch_wrapping_keys(missing)
            # It reads files and verifies signatures, once for each epoch of a source.
            yield partial(self._open_all, found, broken)
        return broken

    def open(self, record: KeyRecord) -> bytes:
        """The key in a record. Raises SealBroken."""
        wrapping_key = self._opened.get(record.wrapping_key_id)
        if wrapping_key is None:
            raise SealBroken("the wrapping key of a key record is not in the store")
        return wrapping_key.open(record)

    def forget_ended(self, at_ms: int) -> None:
        """Drops wrapping keys whose epoch's private half is destroyed by now."""
        for wrapping_key_id, wrapping_key in list(self._opened.items()):
            if wrapping_key.expires_ms <= at_ms:
                del self._opened[wrapping_key_id]

    def _open_all(self, found: Sequence[SealedWrappingKey], broken: dict[bytes, SealBroken]) -> None:
        for sealed in found:
            try:
                self._opened[sealed.wrapping_key_id] = self._open(sealed)
            except SealBroken as error:
                broken[sealed.wrapping_key_id] = error

    def _open(self, sealed: SealedWrappingKey) -> WrappingKey:
        source_public_key = self._directory.pin(sealed.source_id)
        if source_public_key is None:
            raise SealBroken(f"no identity is pinned for key provider {sealed.source_id}")
        try:
            epoch = self._keyring.read_epoch(sealed.epoch_id)
        except KeyringError as error:
            raise SealBroken(str(error)) from error
        return open_wrapping_key(sealed, source_public_key, epoch.private_key)


class ClaimBatch:
    """One transaction that hands out several keys."""

    def __init__(self, opener: Opener, requests: Sequence[ClaimRequest]) -> None:
        self._opener = opener
        self._requests = requests
        self._answers: list[ClaimedKey | SkipbusError] = []
        self._tokens: CommitTokens[list[ClaimedKey | SkipbusError]] = CommitTokens()
        self._seen: set[bytes] = set()

    def run(self) -> Steps[Sequence[ClaimedKey | SkipbusError]]:
        """Claims, opens, deletes and commits; an error stands in the place of those that cannot."""
        at_ms = now_ms()
        records = yield from fetch_for_claim({request.key_id for request in self._requests})
        mine = {i: r for i, r in records.items() if r.target_id == self._opener.local_id and r.expires_ms > at_ms}
        broken = yield from self._opener.load(self._wrapping_key_ids(mine))
        claimed: list[KeyRecord] = []
        self._answers = [self._claim_one(request, records, mine, broken, claimed) for request in self._requests]
        if claimed:
            self._seen.update(record.key_id for record in claimed)
            key_ids = [record.key_id for record in claimed]
            yield from commit_claimed(key_ids, self._events(claimed, at_ms), self._tokens.new(self._answers))
        else:
            yield from end_without_change()
        return self._answers

    def committed(self) -> Steps[Sequence[ClaimedKey | SkipbusError] | None]:
        """The answers of an interrupted commit that happened: its token then stands in the outbox."""
        return self._tokens.committed()

    def _wrapping_key_ids(self, mine: dict[bytes, KeyRecord]) -> set[bytes]:
        wanted = ((mine.get(request.key_id), request.source_id) for request in self._requests)
        return {record.wrapping_key_id for record, source_id in wanted if record and record.source_id == source_id}

    def _claim_one(
        self,
        request: ClaimRequest,
        records: dict[bytes, KeyRecord],
        mine: dict[bytes, KeyRecord],
        broken: dict[bytes, SealBroken],
        claimed: list[KeyRecord],
    ) -> ClaimedKey | SkipbusError:
        record = mine.get(request.key_id)
        if record is None or record.source_id != request.source_id:
            return self._refusal(request, records.get(request.key_id))
        if record.wrapping_key_id in broken:
            return _again(broken[record.wrapping_key_id])
        try:
            key = self._opener.open(record)
        except SealBroken as error:
            return error
        # Whoever asks for it a second time in this batch finds it gone.
        del mine[request.key_id]
        claimed.append(record)
        return ClaimedKey(key.hex(), record.correlation_id)

    def _refusal(self, request: ClaimRequest, record: KeyRecord | None) -> SkipbusError:
        if record is None:
            if request.key_id in self._seen:
                # Its commit was interrupted and it is gone now: by our hand or another's, nobody can tell.
                return StoreUnavailable("the connection to the store broke while the key was handed out")
            return not_available("unknown, expired and zeroized, or given out already")
        if record.target_id != self._opener.local_id:
            return not_available(f"the key is for key provider {record.target_id}")
        if record.source_id != request.source_id:
            return not_available(f"the key is from key provider {record.source_id}")
        return not_available("given out just now" if record.expires_ms > now_ms() else "expired")

    def _events(self, claimed: Sequence[KeyRecord], at_ms: int) -> list[OutboxRow]:
        by_source: dict[str, list[list[object]]] = {}
        for record in claimed:
            by_source.setdefault(record.source_id, []).append([record.key_id, at_ms, record.correlation_id])
        return [
            OutboxRow(
                self._opener.local_id, source, EnvelopeType.KEY_RETRIEVED, encoding.pack(items), len(items), at_ms
            )
            for source, items in by_source.items()
        ]
