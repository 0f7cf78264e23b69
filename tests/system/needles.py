"""The search for secrets where none may be: every spelling that a key could be written down in.

A key is looked for raw, in hex of either case and in base64 of both alphabets at all three alignments, so that
it is found inside a longer encoded text as well. Thousands of keys are looked for in megabytes at once, so the
search first takes the eight bytes at every position and looks them up among the needles' beginnings.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

_HEAD = 8


class Needles:
    """Secrets, each under a name that says which one was found."""

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}

    def add_key(self, name: str, key: bytes) -> None:
        """All spellings of a key."""
        for spelling in spellings(key):
            self._names[spelling] = name

    def add_texts(self, texts: Mapping[str, str]) -> None:
        """Name -> a text of 8 characters or more that is looked for as it is."""
        self._names.update({text.encode(): name for name, text in texts.items()})

    def found_in(self, haystack: bytes) -> list[str]:
        """The names of all secrets in there."""
        by_head: dict[int, list[bytes]] = {}
        for needle in self._names:
            by_head.setdefault(_head_of(needle), []).append(needle)
        suspects = (needle for head in _heads_in(haystack, set(by_head)) for needle in by_head[head])
        return sorted({self._names[needle] for needle in suspects if needle in haystack})

    def found_in_files(self, files: Iterable[Path]) -> list[str]:
        return [f"{name} in {file}" for file in files for name in self.found_in(_content(file))]


def spellings(key: bytes) -> set[bytes]:
    """All ways to write the key down that the search knows."""
    found = {key, key.hex().encode(), key.hex().upper().encode()}
    for shift in range(3):
        # What stands at a shifted alignment depends on the neighbours in its first and last characters.
        text = base64.b64encode(bytes(shift) + key).rstrip(b"=")[2 if shift else 0 : -1]
        text = text[1:] if shift == 2 else text
        found |= {text, text.replace(b"+", b"-").replace(b"/", b"_")}
    return found


def private_keys(keyring: Path) -> dict[str, str]:
    """Name -> text of every private key that lies in a keyring now."""
    found = {}
    for line in (keyring / "identity.pem").read_text().splitlines():
        if not line.startswith("-----"):
            found[f"identity of {keyring}"] = line
    for epoch in (keyring / "epochs").glob("*.json"):
        found[f"epoch {epoch.name}"] = json.loads(epoch.read_text())["private_key"][:64]
    return found


def _head_of(needle: bytes) -> int:
    return memoryview(needle[:_HEAD]).cast("Q")[0]


def _heads_in(haystack: bytes, heads: set[int]) -> set[int]:
    found: set[int] = set()
    view = memoryview(haystack)
    for offset in range(_HEAD):
        length = (len(view) - offset) // _HEAD * _HEAD
        found |= heads.intersection(view[offset : offset + length].cast("Q"))
    return found


def _content(file: Path) -> bytes:
    """A server at work removes files of its own while they are read: what is gone holds nothing."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""
