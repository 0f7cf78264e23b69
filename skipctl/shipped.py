"""Finds the Compose files and grants that come with this release: beside an installation, or in a clone."""

from __future__ import annotations

import sys
from pathlib import Path

from skipbus.shared.errors import OperatorError

_PLACES = (
    Path(sys.prefix) / "share" / "skipbus" / "compose",
    Path(__file__).resolve().parent.parent / "compose",
)


def read_shipped(name: str) -> str:
    """The text of ``compose/<name>``. Raises OperatorError if this installation has no such file."""
    for place in _PLACES:
        if (place / name).is_file():
            return (place / name).read_text()
    raise OperatorError(f"compose/{name} is not part of this installation: use the image or a clone")
