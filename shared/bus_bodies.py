"""Bounds what one message of the broker takes in memory: of one that is too large only its length is kept.

A broker's own limit (``max_message_size``) is 128 MiB where nobody has set it, and a consumer that prefetches would
hold dozens of those. AMQP tells a body's length before the body comes, in pieces of 128 KiB at most. aiormq keeps a
dozen pieces and then lets the broker wait, so what is passed over here piece by piece never adds up. aiormq offers no
place for this: its reading of a body is replaced on each channel. The library is pinned, and a test with 100 MB tells
if a later release reads in another way.
"""

from __future__ import annotations

from typing import Any

from aiormq.abc import AbstractChannel, DeliveredMessage
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from skipbus.shared.protocol.envelopes import MAX_ENVELOPE_BYTES


class LeftOut(bytes):
    """An empty body in the place of one of so many ``octets``."""

    octets: int

    @classmethod
    def of(cls, octets: int) -> LeftOut:
        """Of a body's length."""
        body = cls()
        body.octets = octets
        return body


def bound_bodies(channel: AbstractChannel, limit_bytes: int = MAX_ENVELOPE_BYTES) -> None:
    """From now on a longer body comes as ``LeftOut`` on this channel."""
    reader: Any = channel
    read_content = reader._read_content  # noqa: SLF001 -- see above

    async def read(frame: Any, header: ContentHeader) -> DeliveredMessage:  # noqa: ANN401 -- one of the library's frames
        octets = header.body_size or 0
        if octets <= limit_bytes:
            return await read_content(frame, header)  # type: ignore[no-any-return]
        await _pass_over(reader, octets)
        return DeliveredMessage(delivery=frame, header=header, body=LeftOut.of(octets), channel=channel)

    reader._read_content = read  # noqa: SLF001 -- see above


async def _pass_over(reader: Any, octets: int) -> None:  # noqa: ANN401 -- as above
    passed = 0
    while passed < octets:
        piece = await reader._get_frame()  # noqa: SLF001 -- see above
        if not isinstance(piece, ContentBody):
            # As the library does: it ends the channel, and with it the session.
            raise TypeError("an unexpected frame within a message")
        passed += len(piece.value)
