"""An envelope that is signed while its transaction is committed: the same one, and only where nothing changed."""

from __future__ import annotations

from skipbus.services.syncer.numbers import Numbers
from skipbus.services.syncer.outgoing import Letter, Outgoing
from skipbus.shared.bus import Bus
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.protocol.envelopes import EnvelopeType, check_envelope, read_envelope
from skipbus.shared.secret import Secret

ALICE, BOB = "KP_Alice", "KP_Bob"
IDENTITY = Identity.generate()


def outgoing() -> Outgoing:
    return Outgoing(Bus(Secret("amqp://127.0.0.1:1/"), ALICE, "test"), IDENTITY, ALICE, Numbers())


async def test_what_was_signed_ahead_is_sent_as_it_was_signed() -> None:
    made = outgoing()
    letter = made.signed(Letter(EnvelopeType.KEY_ISSUED, BOB, b"\x90", 17))
    (body,) = await made._signed([letter])
    assert letter.signed is not None
    assert body is letter.signed
    envelope = read_envelope(body)
    assert (envelope.header.number, envelope.payload) == (17, b"\x90")
    check_envelope(envelope, BOB, IDENTITY.public_key, now_ms())


async def test_what_was_signed_ahead_goes_together_with_what_was_not() -> None:
    made = outgoing()
    ahead, other = (Letter(EnvelopeType.KEY_ISSUED, BOB, b"\x90", number) for number in (17, 18))
    signed = made.signed(ahead)
    bodies = await made._signed([signed, other])
    assert signed.signed is not None
    # No two signatures of the same bytes are alike.
    assert bodies[0] == signed.signed
    assert [read_envelope(body).header.number for body in bodies] == [17, 18]
