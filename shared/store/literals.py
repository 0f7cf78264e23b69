"""Values as they stand in a statement's text: hexadecimal literals, so that no text of anybody's is there."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache


def text(value: str) -> str:
    """A text as a literal."""
    return f"_utf8mb4 0x{value.encode().hex()}" if value else "''"


# For the same few ids and types, which stand in every statement.
name = lru_cache(maxsize=4096)(text)


def octets(value: bytes) -> str:
    """A byte string as a literal."""
    return f"0x{value.hex()}" if value else "''"


def hexes(values: Iterable[bytes]) -> list[str]:
    """Byte strings as literals; none may be empty."""
    return [f"0x{value.hex()}" for value in values]


def hex_list(values: Iterable[bytes]) -> str:
    """Byte strings as literals with commas between them."""
    return ",".join(hexes(values))
