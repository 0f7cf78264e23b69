"""The bytes of structured messages: MessagePack in the form that the reader expects, and nothing else.

Everything that is signed, sealed or stored is encoded here, so that one place bounds the cost of a hostile message.
msgspec checks types and bounds while it decodes, and makes no object that the expected form does not have.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any

from msgspec import Meta, Raw, msgpack

MAX_NUMBER = 2**63 - 1
# An integer that every column of the store holds.
Natural = Annotated[int, Meta(ge=0, le=MAX_NUMBER)]
Positive = Annotated[int, Meta(ge=1, le=MAX_NUMBER)]


class MalformedError(ValueError):
    """The bytes are not one well-formed message of the expected form."""


def pack(value: object) -> bytes:
    """MessagePack bytes of a plain value; the same value always gives the same bytes."""
    return msgpack.encode(value)


def unpack(data: bytes | Raw, form: Any = Any) -> Any:  # noqa: ANN401 -- the value has the form
    """The value in ``data``; ``form`` is a type, its bounds annotated by ``msgspec.Meta``. Raises MalformedError."""
    try:
        return _decoder(form).decode(data)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"not a well-formed message: {type(error).__name__}") from error


@lru_cache(maxsize=64)
def _decoder(form: Any) -> msgpack.Decoder[Any]:  # noqa: ANN401
    return msgpack.Decoder(form)
