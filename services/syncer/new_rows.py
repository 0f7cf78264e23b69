"""What wakes the relay: there are new rows in the outbox. And what was said of one of them (``shared/hints.py``)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from skipbus.shared.hints import Hint, read_hint
from skipbus.shared.logs import get_logger

# Now and then a nudge is faster than its row. Where one hint in five leads to nothing, they are forged, or the store
# takes longer than nudges do: then they are not believed for a while.
TRUST_NOTHING_SECONDS = 60.0
MAX_CREDIT = 8
MISS_COSTS = 4
_MAX_NUMBERED = 1_000

_log = get_logger("outbox")


class News(NamedTuple):
    """What was heard since the last time."""

    hint: Hint | None = None
    """A row that is there now or in a moment."""
    early: bool = False
    """Rows may be there only in a moment."""
    others: bool = False
    """There may be rows of which nothing was said."""


class NewRows:
    """Of one event loop; what is noted may be noted by the thread that numbers."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self._news = News()
        self._trust_from = 0.0
        self._credit = MAX_CREDIT
        self._numbered: dict[bytes, None] = {}

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
        if news.hint is not None and news.hint.token in self._numbered:
            # A round that was under way when it came has found the row.
            return News(others=news.others, early=news.early and news.others)
        return news

    def note_numbered(self, tokens: Iterable[bytes | None]) -> None:
        """These rows are in envelopes: what is said of them is no news any more."""
        for token in tokens:
            if token is not None:
                self._numbered[token] = None
        while len(self._numbered) > _MAX_NUMBERED:
            del self._numbered[next(iter(self._numbered))]

    def note_found(self, token: bytes) -> None:
        """A hint has led to this row, which is in an envelope now."""
        self.note_numbered([token])
        self._credit = min(MAX_CREDIT, self._credit + 1)

    def note_missed(self) -> None:
        """A hint has led to nothing; after too many of them hints are not believed for a while."""
        self._credit -= MISS_COSTS
        if self._credit >= 0:
            return
        _log.debug("hints lead to nothing", trusted_again_seconds=TRUST_NOTHING_SECONDS)
        self._credit = 0
        self._trust_from = time.monotonic() + TRUST_NOTHING_SECONDS
