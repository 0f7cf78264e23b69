"""Reads the parameters of a request strictly: they may be long, repeated, or not ASCII.

Every refusal names the parameter and never its value. Unknown parameters are ignored, so that a client with its own
parameters still gets its key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from urllib.parse import parse_qsl

from skipbus.shared.errors import CallerError
from skipbus.shared.protocol.keys import (
    DEFAULT_ENTROPY_BITS,
    DEFAULT_KEY_BITS,
    parse_entropy_size,
    parse_key_id,
    parse_key_size,
)
from skipbus.shared.protocol.system_ids import RemoteSystemIds, validate_system_id

_MAX_FIELDS = 16
_SPELLINGS = {"remoteSystemId": "remoteSystemID"}


# Encryptors repeat the same few query strings, which contain no secret.
@lru_cache(maxsize=1024)
def parse_query(query: str) -> Mapping[str, tuple[str, ...]]:
    """All values of each parameter. Raises CallerError for too many fields."""
    try:
        fields = parse_qsl(query, keep_blank_values=True, errors="surrogateescape", max_num_fields=_MAX_FIELDS)
    except ValueError as error:
        raise CallerError(f"the query has more than {_MAX_FIELDS} fields", parameter="query") from error
    values: dict[str, tuple[str, ...]] = {}
    for name, value in fields:
        known = _SPELLINGS.get(name, name)
        values[known] = (*values.get(known, ()), value)
    return values


def remote_system_id(query: str, allowed: RemoteSystemIds) -> str:
    """The remoteSystemID (draft Table 2), which must match the configured list. Raises CallerError."""
    text = _single(query, "remoteSystemID")
    if text is None:
        raise CallerError("remoteSystemID is missing", parameter="remoteSystemID")
    return _checked_id(text, allowed)


def key_size_bits(query: str) -> int:
    """The size in bits (draft 4.2), 256 by default. Raises CallerError."""
    return _parsed(query, "size", parse_key_size, DEFAULT_KEY_BITS)


def entropy_size_bits(query: str) -> int:
    """The minentropy in bits (draft 4.3), 256 by default. Raises CallerError."""
    return _parsed(query, "minentropy", parse_entropy_size, DEFAULT_ENTROPY_BITS)


def key_id(text: str) -> bytes:
    """The keyId of a path (draft 4.2.1). Raises CallerError."""
    try:
        return parse_key_id(text)
    except ValueError as error:
        raise CallerError(str(error), parameter="keyId") from error


@lru_cache(maxsize=4096)
def _checked_id(text: str, allowed: RemoteSystemIds) -> str:
    try:
        validate_system_id(text)
    except ValueError as error:
        raise CallerError(f"remoteSystemID is not a system id: {error}", parameter="remoteSystemID") from error
    if text not in allowed:
        raise CallerError(
            "remoteSystemID is not one that this key provider shares keys with (see /capabilities)",
            parameter="remoteSystemID",
        )
    return text


def _parsed(query: str, name: str, parse: Callable[[str], int], default: int) -> int:
    text = _single(query, name) if query else None
    if text is None:
        return default
    try:
        return parse(text)
    except ValueError as error:
        raise CallerError(str(error), parameter=name) from error


def _single(query: str, name: str) -> str | None:
    values = parse_query(query).get(name, ())
    if len(values) > 1:
        raise CallerError(f"{name} is given more than once", parameter=name)
    return values[0] if values else None
