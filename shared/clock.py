"""Wall-clock time in the one unit that skipbus stores and sends: UTC milliseconds since the Unix epoch."""

from __future__ import annotations

import time


def now_ms() -> int:
    """The host's clock in UTC milliseconds."""
    return time.time_ns() // 1_000_000
