"""What becomes of an envelope that is sent by HTTPS, in words that need nothing of HTTP.

Apart from ``skipbus.services.syncer.https_link``, so that a syncer without such a peer loads no HTTP client.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Posted(Enum):
    """What became of an envelope."""

    TAKEN = "taken"
    REFUSED = "refused"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Answer:
    """The peer's word on an envelope; ``reason`` and ``explanation`` where it is refused."""

    posted: Posted
    reason: str = ""
    explanation: str = ""
