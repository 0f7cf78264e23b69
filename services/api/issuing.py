"""The source's side: makes keys for a target, seals them, and places them where the target serves from.

A key exists in clear only here, between the random numbers and the answer. Over a store link "placed" means
that the sealed record is committed in the shared store. One lane, one set of wrapping keys.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from skipbus.services.api.links import IssuedKey, IssueRequest
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import EpochSpan, PublicEpoch, current_epoch
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.crypto.sealing import MAX_SEALS, KeyRecord, SealedWrappingKey, WrappingKey, make_wrapping_key
from skipbus.shared.errors import NoEntropy, PeerNotReady, SkipbusError
from skipbus.shared.peer_directory import PeerDirectory
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.announcements import Announcement
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.protocol.keys import new_key_id
from skipbus.shared.store.keys import commit_issued, fetch_is_placed
from skipbus.shared.store.packets import OutboxRow
from skipbus.shared.store.steps import Steps


@dataclass(slots=True)
class _Current:
    """The wrapping key in use for a target, and its sealed form for as long as the store may not have it.

    During ``span`` it is the one to use, as long as the target has not announced anything else.
    """

    key: WrappingKey
    unstored: SealedWrappingKey | None
    announcement: Announcement
    span: EpochSpan


class Sealer:
    """The wrapping keys of one lane, one for each target and epoch."""

    def __init__(self, local_id: str, identity: Identity, directory: PeerDirectory) -> None:
        self.local_id = local_id
        self._identity = identity
        self._directory = directory
        self._current: dict[str, _Current] = {}

    def wrapping_key_for(self, target_id: str, at_ms: int) -> _Current:
        """The wrapping key for the target's epoch at ``at_ms``, made where there is none. Raises PeerNotReady.

        Making one takes milliseconds; it is then in use at once.
        """
        current = self.held(target_id, at_ms)
        if current is None:
            announcement = self._announcement(target_id)
            epoch = _epoch_at(announcement, at_ms)
            made = make_wrapping_key(self._identity, self.local_id, target_id, epoch)
            current = self._current[target_id] = _Current(*made, announcement, epoch.span)
        return current

    def make(self, target_id: str, at_ms: int) -> None:
        """``wrapping_key_for`` for a thread."""
        self.wrapping_key_for(target_id, at_ms)

    def held(self, target_id: str, at_ms: int) -> _Current | None:
        """The wrapping key for the target's epoch at ``at_ms``, if it is made. Raises PeerNotReady."""
        announcement = self._announcement(target_id)
        current = self._current.get(target_id)
        if current is None:
            _epoch_at(announcement, at_ms)
            return None
        span = current.span
        if current.announcement is not announcement or not span.starts_ms <= at_ms < span.ends_ms:
            epoch = _epoch_at(announcement, at_ms)
            if current.key.epoch_id != epoch.epoch_id:
                return None
            current.announcement, current.span = announcement, epoch.span
        return None if current.key.seals >= MAX_SEALS else current

    def load(self, target_ids: Iterable[str], at_ms: int) -> Steps[dict[str, _Current]]:
        """The wrapping keys of those that can be sealed to; one that must be made is made in a thread."""
        used: dict[str, _Current] = {}
        for target_id in target_ids:
            try:
                current = self.held(target_id, at_ms)
                if current is None:
                    yield partial(self.make, target_id, at_ms)
                    current = self.wrapping_key_for(target_id, at_ms)
            except PeerNotReady:
                continue  # each of its callers is told
            used[target_id] = current
        return used

    def _announcement(self, target_id: str) -> Announcement:
        announcement = self._directory.get(target_id)
        if announcement is None:
            raise not_usable(target_id, identity_changed=target_id in self._directory.conflicts())
        return announcement

    def forget_ended(self, at_ms: int) -> None:
        """Drops wrapping keys whose epoch's private half is destroyed by now."""
        for target_id, current in list(self._current.items()):
            if current.key.expires_ms <= at_ms:
                del self._current[target_id]


def _epoch_at(announcement: Announcement, at_ms: int) -> PublicEpoch:
    epoch = current_epoch(announcement.epochs, at_ms)
    if epoch is None:
        raise PeerNotReady(
            f"key provider {announcement.system_id} has no epoch for the present time: its janitor has been away for "
            "too long, or the clocks differ"
        )
    return epoch


def not_usable(target_id: str, *, identity_changed: bool) -> PeerNotReady:
    """The refusal for a KP that the list allows, and that nobody has heard of yet or that changed its identity."""
    if identity_changed:
        return PeerNotReady(
            f"key provider {target_id} presents another identity than the pinned one: no key is sealed to it until "
            "an operator accepts that (skipctl identity accept)"
        )
    return PeerNotReady(
        f"key provider {target_id} has not announced itself: no key can be sealed to it until it has started "
        "once over this store"
    )


@dataclass(slots=True)
class _Planned:
    """All of a key but its octets: its keyId, when it expires (UTC ms), and the wrapping key that will close it."""

    request: IssueRequest
    key_id: bytes
    expires_ms: int
    wrapping_key: WrappingKey


class IssueBatch:
    """One transaction that places several keys."""

    def __init__(self, sealer: Sealer, key_ttl_seconds: int, requests: Sequence[IssueRequest]) -> None:
        self._sealer = sealer
        self._ttl_ms = key_ttl_seconds * 1000
        self._requests = requests
        # Of each run a keyId and its answers: an interrupted commit may land late, when the next run is on its way.
        self._runs: list[tuple[bytes, list[IssuedKey | SkipbusError]]] = []

    def run(self) -> Steps[Sequence[IssuedKey | SkipbusError]]:
        """Makes, seals and commits a key for each request; PeerNotReady stands in the place of those that cannot.

        The events are sent first, since they need no key: the server works on them while keys are made and sealed.
        """
        at_ms = now_ms()
        used = yield from self._sealer.load({request.target_id for request in self._requests}, at_ms)
        outcomes = [self._plan(request, at_ms, used) for request in self._requests]
        planned = [outcome for outcome in outcomes if isinstance(outcome, _Planned)]
        if not planned:
            return [outcome for outcome in outcomes if isinstance(outcome, SkipbusError)]
        answers: list[IssuedKey | SkipbusError] = []
        make_records = partial(_make_records, outcomes, answers)
        unstored = [current.unstored for current in used.values() if current.unstored]
        self._runs.append((planned[0].key_id, answers))
        yield from commit_issued(make_records, unstored, self._events(planned, at_ms))
        for current in used.values():
            current.unstored = None
        return answers

    def committed(self) -> Steps[Sequence[IssuedKey | SkipbusError] | None]:
        """The answers of an interrupted commit that happened: its keys are there, since nobody knows their keyIds."""
        for key_id, answers in self._runs:
            if (yield from fetch_is_placed(key_id)):
                return answers
        return None

    def _plan(self, request: IssueRequest, at_ms: int, used: dict[str, _Current]) -> _Planned | SkipbusError:
        target_id = request.target_id
        try:
            if target_id not in used:
                # Raises for all but a peer that has become usable since.
                used[target_id] = self._sealer.wrapping_key_for(target_id, at_ms)
            key_id = new_key_id()
        except SkipbusError as error:
            return error
        except OSError as error:
            raise no_entropy() from error
        wrapping_key = used[target_id].key
        # A record must not outlive the private half that opens it.
        return _Planned(request, key_id, min(at_ms + self._ttl_ms, wrapping_key.expires_ms), wrapping_key)

    def _events(self, planned: Sequence[_Planned], at_ms: int) -> list[OutboxRow]:
        by_target: dict[str, list[list[object]]] = {}
        for p in planned:
            item = [p.key_id, p.request.size_bits, p.expires_ms, p.request.correlation_id]
            by_target.setdefault(p.request.target_id, []).append(item)
        return [
            OutboxRow(self._sealer.local_id, target, EnvelopeType.KEY_ISSUED, encoding.pack(items), len(items), at_ms)
            for target, items in by_target.items()
        ]


def _make_records(
    outcomes: Iterable[_Planned | SkipbusError], answers: list[IssuedKey | SkipbusError]
) -> list[KeyRecord]:
    """Makes the keys that are planned, sealed; ``answers`` gets them in clear, in order, with the errors between them.

    Raises NoEntropy.
    """
    records: list[KeyRecord] = []
    for outcome in outcomes:
        if isinstance(outcome, SkipbusError):
            answers.append(outcome)
            continue
        try:
            key = os.urandom(outcome.request.size_bits // 8)
        except OSError as error:
            raise no_entropy() from error
        key_id = outcome.key_id
        records.append(outcome.wrapping_key.seal(key_id, key, outcome.expires_ms, outcome.request.correlation_id))
        answers.append(IssuedKey(key_id.hex(), key.hex()))
    return records


def no_entropy() -> NoEntropy:
    """The refusal where the operating system gives no random octets; to be raised from what it said."""
    return NoEntropy("the random number generator of the operating system failed")
