"""Epochs: spans of time for which a KP has one HPKE key pair. Pure; time is an argument.

Keys are sealed to an epoch from ``starts_ms`` until ``ends_ms``. Its private half is kept until ``destroy_ms``, when
the last key that may be sealed to it has expired. So a source never lets a key outlive ``destroy_ms`` of its epoch.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass

EPOCH_ID_BYTES = 16
# The largest allowed difference between the clocks of two key providers.
MAX_CLOCK_SKEW_MS = 30_000
# An announcement has 1.7 kB for each epoch; this bounds it at about 220 kB.
MAX_EPOCHS_AHEAD = 128


@dataclass(frozen=True)
class EpochSpan:
    """The times of an epoch (UTC ms): sealed to from starts until ends, opened until destroy."""

    starts_ms: int
    ends_ms: int
    destroy_ms: int


@dataclass(frozen=True)
class PublicEpoch:
    """One announced epoch: ``public_key`` is 1,568 bytes of ML-KEM-1024 and 97 of P-384."""

    epoch_id: bytes
    span: EpochSpan
    public_key: bytes


def new_epoch_id() -> bytes:
    """A new random epoch id."""
    return secrets.token_bytes(EPOCH_ID_BYTES)


def retention_ms(key_ttl_seconds: int) -> int:
    """How long an epoch's private half is kept after its end: a key's lifetime, and the allowed clock skew."""
    ttl_ms = key_ttl_seconds * 1000
    return ttl_ms + min(MAX_CLOCK_SKEW_MS, ttl_ms)


def missing_spans(have: Iterable[EpochSpan], now_ms: int, epoch_seconds: int, key_ttl_seconds: int) -> list[EpochSpan]:
    """The spans that are missing to cover the time from now until one key lifetime ahead without a gap.

    Gaps anywhere are filled: a file may be lost, or the clock may have been set back.
    """
    step_ms = epoch_seconds * 1000
    until_ms = now_ms + min(key_ttl_seconds * 1000 + step_ms, MAX_EPOCHS_AHEAD * step_ms)
    present = sorted(have, key=lambda span: span.starts_ms)
    missing: list[EpochSpan] = []
    at_ms = now_ms - now_ms % step_ms
    while at_ms <= until_ms:
        covered_until = max((s.ends_ms for s in present if s.starts_ms <= at_ms < s.ends_ms), default=None)
        if covered_until is None:
            covered_until = _end_of_gap(present, at_ms, step_ms)
            missing.append(EpochSpan(at_ms, covered_until, covered_until + retention_ms(key_ttl_seconds)))
        at_ms = covered_until
    return missing


def _end_of_gap(present: list[EpochSpan], at_ms: int, step_ms: int) -> int:
    """The end of a span that starts at ``at_ms``: on the grid of epochs, or at the start of the next existing span."""
    boundary = at_ms + step_ms - at_ms % step_ms
    return min((s.starts_ms for s in present if at_ms < s.starts_ms < boundary), default=boundary)


def longest_life_ms(epoch_seconds: int, key_ttl_seconds: int) -> int:
    """The longest life of a private half: made ahead, used, and kept for the last key."""
    ahead_ms = (key_ttl_seconds + epoch_seconds) * 1000
    return ahead_ms + epoch_seconds * 1000 + retention_ms(key_ttl_seconds)


def has_lost_epochs(before: Iterable[PublicEpoch], after: Iterable[PublicEpoch], now_ms: int) -> bool:
    """Whether a KP that announced ``before`` and then ``after`` has lost epochs before their end.

    A KP announces an epoch until its end. If one is missing earlier, its folder of epochs was lost or replaced, and
    what is sealed to that epoch, or to earlier ones, cannot be opened any more.
    """
    still = {epoch.epoch_id for epoch in after}
    return any(e.epoch_id not in still and e.span.ends_ms > now_ms + MAX_CLOCK_SKEW_MS for e in before)


def current_epoch(epochs: Iterable[PublicEpoch], now_ms: int) -> PublicEpoch | None:
    """The announced epoch to seal to now, or None."""
    return next((e for e in epochs if e.span.starts_ms <= now_ms < e.span.ends_ms), None)
