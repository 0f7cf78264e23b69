"""Facts about a peer's endpoint that need no network."""

from __future__ import annotations

import asyncio

import structlog.testing

from skipbus.services.syncer.https_peer import HttpsPeer
from skipbus.services.syncer.transport import Outcome, PeerAnswer
from skipbus.shared.protocol.envelopes import MAX_ENVELOPE_BYTES
from skipbus.shared.settings.peers import PeerSettings


async def test_a_fault_while_an_answer_is_handled_is_logged() -> None:
    peer = HttpsPeer(PeerSettings("KP_Bob", "bus", b"", "https://127.0.0.1:9"), asyncio.Event())
    answered = asyncio.Event()

    async def fail(answer: PeerAnswer) -> None:
        assert answer.outcome is Outcome.REJECTED
        answered.set()
        raise RuntimeError("a fault of ours")

    with structlog.testing.capture_logs() as lines:
        # Nobody takes so large an envelope, so nothing is sent.
        assert peer.post_soon(bytes(MAX_ENVELOPE_BYTES + 1), fail)
        await answered.wait()
        await asyncio.sleep(0)
        await peer.close()
    assert [(line["log_level"], line["peer"], str(line["exc_info"])) for line in lines] == [
        ("error", "KP_Bob", "a fault of ours")
    ]
