"""What wakes the relay: there are new rows in the outbox. And what was said of one of them (``shared.hints``)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

from shared.hints import Hint, read_hint

# After a hint that led to nothing: it was forged, or the store's commits take longer than nudges.
TRUST_NOTHING_SECONDS = 60.0


class News(NamedTuple):
    """What was heard since the last time."""

    hint: Hint | None = None
    """A row that is there now or in a moment."""
    early: bool = False
    """Rows may be there only in a moment."""
    others: bool = False
    """There may be rows of which nothing was said."""


class NewRows:
    """Of one event loop, but for ``note_missed``."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self._news = News()
        self._trust_from = 0.0

    def hear(self, items: Sequence[bytes]) -> None:
        """A nudge; of several hints the last one counts."""
        trusted = items and time.monotonic() >= self._trust_from
        hint = read_hint(items[-1]) if trusted else None
        known, early, others = self._news
        others = others or len(items) != 1 or hint is None or known is not None
        self._news = News(hint or known, early or bool(items), others)
        self.event.set()

    def take(self) -> News:
        """What was heard; each is said once."""
        news, self._news = self._news, News()
        return news

    def note_missed(self) -> None:
        """There was no such row: hints are not believed for a while."""
        self._trust_from = time.monotonic() + TRUST_NOTHING_SECONDS
