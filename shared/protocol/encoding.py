"""Bytes of structured messages: MessagePack with hard limits, and nothing but plain types.

Everything that is signed, sealed or stored goes through here, so that one place bounds what a hostile
message may cost: no extension types, no timestamps, string keys only, sizes limited by the input's.
"""

from __future__ import annotations

from typing import Any

import msgpack  # type: ignore[import-untyped]  # the package has no type information


class MalformedError(ValueError):
    """The bytes are not one well-formed message within the limits."""


def pack(value: object) -> bytes:
    """MessagePack bytes of plain values (the same value always gives the same bytes)."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def unpack(data: bytes, max_items: int = 100_000) -> Any:  # noqa: ANN401 -- what a message holds is checked by whoever reads it
    """The plain value in ``data``; raises MalformedError where it is anything else."""
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=4096,
            max_bin_len=len(data),
            max_array_len=max_items,
            max_map_len=256,
            max_ext_len=0,
        )
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise MalformedError(f"not a well-formed message: {type(error).__name__}") from error
