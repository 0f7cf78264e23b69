"""Somebody who can write to MySQL wants keys sealed to himself: he replaces a peer's announcement and pin together."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from sqlalchemy import Engine

from sandbox.client import get
from sandbox.key_provider import KeyProvider
from sandbox.mariadb import Database
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import EpochSpan, PublicEpoch, new_epoch_id
from skipbus.shared.crypto.hpke import HybridPrivateKey
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.peer_directory import PIN_REREAD_MS
from skipbus.shared.protocol.announcements import Announcement, sign_announcement
from skipbus.shared.store.announcements import upsert_announcement
from skipbus.shared.store.engine import make_engine
from skipbus.shared.store.pinned_identities import update_pin
from tests.system.harness import ALICE, BOB, Lab, in_background, rows
from tests.waiting import wait_for


@dataclass(frozen=True)
class Thief:
    """One who may write whatever he likes into the store, as often as he likes."""

    engine: Engine
    identity: Identity
    epoch: PublicEpoch

    @classmethod
    def with_access_to(cls, database: Database) -> Thief:
        mysql = database.settings
        start_ms = now_ms() - 60_000
        span = EpochSpan(start_ms, start_ms + 3_600_000, start_ms + 7_200_000)
        epoch = PublicEpoch(new_epoch_id(), span, HybridPrivateKey.generate().public_bytes())
        return cls(make_engine(mysql), Identity.generate(), epoch)

    def replace_pin_and_announcement(self) -> None:
        forged = Announcement(BOB, self.identity.public_key, now_ms(), "MLKEM1024-P384", (self.epoch,))
        with self.engine.begin() as connection:
            upsert_announcement(connection, forged, sign_announcement(forged, self.identity))
            update_pin(connection, ALICE, BOB, self.identity.public_key, now_ms())

    def insist(self, stop: threading.Event) -> None:
        """The real KP_Bob puts its announcement back within a second or two."""
        while not stop.wait(0.2):
            self.replace_pin_and_announcement()

    def may_open(self, database: Database) -> bool:
        """Whether any key waits that was sealed to him."""
        return bool(rows(database, "SELECT 1 FROM wrapping_keys WHERE epoch_id = %s", self.epoch.epoch_id))


def conflict_seen(kp: KeyProvider) -> bool:
    return bool(get(kp.url, "status", "sync").body["peers"][BOB]["identity_conflict"])


def ask_for_seconds(lab: Lab, alice: KeyProvider, seconds: float) -> list[int]:
    """The statuses of `GET /key` for KP_Bob during the block. A key that is answered must be KP_Bob's to open."""
    statuses = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = get(alice.url, "key", remoteSystemID=BOB)
        statuses.append(answer.status)
        if answer.status == 200:
            lab.assert_retrievable(lab.remember(alice, BOB, answer))
        else:
            assert "presents another identity than the pinned one" in answer.error
        time.sleep(0.1)
    return statuses


def test_whoever_replaces_pin_and_announcement_together_in_the_store_gets_no_key_sealed_to_himself(lab: Lab) -> None:
    alice, bob = lab.add_pair()
    thief = Thief.with_access_to(lab.database)
    with in_background(thief.insist):
        wait_for(lambda: conflict_seen(alice), timeout_seconds=30)
        statuses = ask_for_seconds(lab, alice, PIN_REREAD_MS / 1000 + 3)
        assert 500 in statuses
        assert set(statuses) <= {200, 500}
        # A process that starts now finds nothing but the thief's rows in the store; the keyring knows better.
        for role in ("api", "syncer"):
            alice.stop(role)
            alice.start(role)
        wait_for(alice.is_healthy, timeout_seconds=30)
        assert set(ask_for_seconds(lab, alice, 5)) <= {200, 500}
        assert not thief.may_open(lab.database)
    assert not thief.may_open(lab.database)
    thief.engine.dispose()
    assert "identity changed: refused until an operator accepts it" in alice.log_of("api").read_text()
    lab.wait_announced(alice, BOB)
    lab.assert_retrievable(lab.issue(alice, BOB))
    bob.wait_healthy(30)
