"""The bytes of structured messages: MessagePack with hard limits and plain types only.

Everything that is signed, sealed or stored is encoded here, so that one place bounds the cost of a hostile message: no
extension types, no timestamps, string keys only, and no size above that of the input.
"""

from __future__ import annotations

from typing import Any

import msgpack  # type: ignore[import-untyped]  # the package has no type information


class MalformedError(ValueError):
    """The bytes are not one well-formed message within the limits."""


def pack(value: object) -> bytes:
    """MessagePack bytes of a plain value; the same value always gives the same bytes."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def unpack(data: bytes, max_items: int = 100_000) -> Any:  # noqa: ANN401 -- the caller checks what it holds
    """The plain value in ``data``. Raises MalformedError."""
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
