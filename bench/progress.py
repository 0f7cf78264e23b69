"""What a run of the bench reports before its table: lines on stderr."""

from __future__ import annotations

import sys


def tell(text: str) -> None:
    """One line."""
    print(text, file=sys.stderr, flush=True)
