"""System ids of key providers, and globs of them (draft section 4.1, Table 5). Pure.

An id has 1 to 64 printable ASCII characters (the draft requires at least 32 bytes). It does not start or end with a
space, and has no pattern characters. A pattern matches the whole id, case-sensitively.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

MAX_ID_LENGTH = 64
_PRINTABLE = re.compile(r"[\x20-\x7e]{1,64}")
_CHARACTERS = tuple(map(chr, range(0x20, 0x7F)))
_LIST = re.compile(r"\[!?+\]?+[^\]]*\]")
_GLOB_CHARACTERS = frozenset("*?[]")


def _validate_characters(text: str, what: str) -> str:
    if not text:
        raise ValueError(f"{what} is empty")
    if len(text) > MAX_ID_LENGTH:
        raise ValueError(f"{what} has {len(text)} characters; at most {MAX_ID_LENGTH} are allowed")
    if not _PRINTABLE.fullmatch(text):
        raise ValueError(f"{what} has a character that is not printable ASCII")
    if text != text.strip(" "):
        raise ValueError(f"{what} starts or ends with a space")
    return text


def validate_system_id(text: str) -> str:
    """Returns the id if it may name one key provider (draft 4.1.1). Raises ValueError with a sentence."""
    _validate_characters(text, "the system id")
    if _GLOB_CHARACTERS.intersection(text):
        raise ValueError("the system id has one of the pattern characters * ? [ ]")
    return text


def validate_pattern(text: str) -> str:
    """Returns the text if it is an id or a glob (draft 4.1.2). Raises ValueError with a sentence."""
    _validate_characters(text, "the remote system id")
    fault = _fault_of_lists(text)
    if fault:
        raise ValueError(f"the remote system id has {fault}")
    return text


def _fault_of_lists(text: str) -> str:
    """What is wrong with the lists of a glob; empty if nothing is.

    As in POSIX, a ``]`` at the start of a list belongs to it: ``[]abc]`` and ``[!]]`` are complete, ``[]`` and ``[!]``
    never end. No id has a ``[``, so a ``[`` inside a list is a mistake or a POSIX class.
    """
    outside = _LIST.sub("", text)
    if "[]" in outside or "[!]" in outside:
        return "an empty list, [] or [!], which matches nothing"
    if "[" in outside or "]" in outside:
        return "a [ or ] without its partner"
    return next(filter(None, map(_fault_of_list, _LIST.findall(text))), "")


def _fault_of_list(text: str) -> str:
    if "[" in text[1:]:
        return "a [ within a list"
    matches = re.compile(fnmatch.translate(text)).match
    return "" if any(map(matches, _CHARACTERS)) else f"the list {text}, which matches nothing"


def is_pattern(text: str) -> bool:
    """Whether the text is a glob."""
    return bool(_GLOB_CHARACTERS.intersection(text))


class RemoteSystemIds:
    """The configured list of remote KPs: exact ids and globs ``* ? [list] [!list]`` (draft Table 5).

    ``local_id`` itself is in the list only if it is listed by name.
    """

    def __init__(self, entries: Iterable[str], local_id: str | None = None) -> None:
        # A laboratory with one KP lists its own id. A glob never matches it: the draft's list is of remote KPs.
        self._local_id = local_id
        self.entries = tuple(validate_pattern(entry) for entry in entries)
        self.exact = frozenset(entry for entry in self.entries if not is_pattern(entry))
        self._patterns = tuple(re.compile(fnmatch.translate(entry)) for entry in self.entries if is_pattern(entry))

    def __contains__(self, system_id: object) -> bool:
        if not isinstance(system_id, str):
            return False
        if system_id in self.exact:
            return True
        return system_id != self._local_id and any(p.match(system_id) for p in self._patterns)
