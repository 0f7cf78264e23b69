"""Facts about the janitor's keeping of epochs: made ahead, on the disk before they are announced, destroyed on time.

The clock is the test's: days pass in a moment.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from skipbus.services.janitor.epochs import EpochKeeper
from skipbus.shared.crypto.epochs import current_epoch
from skipbus.shared.crypto.identity import Identity, fingerprint
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.errors import KeyringError, StoreRefused, StoreUnavailable
from skipbus.shared.protocol.announcements import Announcement, read_announcement, sign_announcement
from skipbus.shared.store import announcements, pinned_identities
from tests.integration.key_providers import Store, settings_for, tend

KP = "KP_Alice"
START_MS = 1_800_000_123_456
EPOCH_MS = 60_000
TTL_MS = 300_000


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return Keyring.create(tmp_path / "keyring", KP)


@pytest.fixture
def keeper(store: Store, keyring: Keyring) -> EpochKeeper:
    return keeper_of(store, keyring)


def keeper_of(store: Store, keyring: Keyring) -> EpochKeeper:
    settings = settings_for(store.database, KP, keyring.path, SKIP_EPOCH_SECONDS="60", SKIP_KEY_TTL_SECONDS="300")
    return EpochKeeper(settings, store.engine, keyring)


def stored(store: Store) -> Announcement:
    """What other KPs read of this one."""
    with store.engine.connect() as connection:
        body = announcements.fetch_announcement(connection, KP)
    assert body is not None
    return read_announcement(body)


def epoch_files(keyring: Keyring) -> set[str]:
    return {path.name for path in (keyring.path / "epochs").iterdir()}


def test_the_first_tending_announces_an_epoch_for_now_and_for_a_key_lifetime_ahead(
    store: Store, keyring: Keyring, keeper: EpochKeeper
) -> None:
    tend(keeper, START_MS)
    announcement = stored(store)
    assert announcement.system_id == KP
    assert announcement.public_key == keyring.identity.public_key
    for at_ms in range(START_MS, START_MS + TTL_MS + 1, 1000):
        assert current_epoch(announcement.epochs, at_ms) is not None


def test_every_announced_epoch_has_its_private_half_on_the_disk(
    store: Store, keyring: Keyring, keeper: EpochKeeper
) -> None:
    tend(keeper, START_MS)
    reopened = Keyring.open(keyring.path, KP)
    for epoch in stored(store).epochs:
        assert reopened.read_epoch(epoch.epoch_id).public() == epoch


def test_a_store_that_is_away_costs_an_announcement_but_no_epoch(
    store: Store, keyring: Keyring, keeper: EpochKeeper
) -> None:
    with store.without_table("announcements"), pytest.raises((StoreRefused, StoreUnavailable)):
        tend(keeper, START_MS)
    made = epoch_files(keyring)
    assert made
    tend(keeper, START_MS + 1000)
    assert epoch_files(keyring) == made
    assert len(stored(store).epochs) == len(made)


def test_nothing_is_written_while_nothing_changes(store: Store, keyring: Keyring, keeper: EpochKeeper) -> None:
    tend(keeper, START_MS)
    before = stored(store), epoch_files(keyring)
    for second in range(1, 50):
        tend(keeper, START_MS + second * 1000 - START_MS % EPOCH_MS)
    assert (stored(store), epoch_files(keyring)) == before


def test_over_an_hour_there_is_always_an_epoch_and_the_keyring_does_not_grow(
    store: Store, keyring: Keyring, keeper: EpochKeeper
) -> None:
    most = 0
    for at_ms in range(START_MS, START_MS + 3_600_000, 20_000):
        tend(keeper, at_ms)
        announcement = stored(store)
        assert current_epoch(announcement.epochs, at_ms) is not None
        assert all(epoch.span.ends_ms > at_ms for epoch in announcement.epochs)
        most = max(most, len(epoch_files(keyring)))
    # A lifetime and one epoch ahead, the present one, and a lifetime and the clocks' difference behind.
    assert most <= (TTL_MS + EPOCH_MS) // EPOCH_MS + 2 + (TTL_MS + 30_000) // EPOCH_MS + 1


def test_an_epoch_is_destroyed_when_its_last_key_has_expired_and_not_before(
    keyring: Keyring, keeper: EpochKeeper
) -> None:
    tend(keeper, START_MS)
    first = min((keyring.read_epoch(i) for i in keyring.epoch_ids()), key=lambda e: e.span.starts_ms)
    name = f"{first.epoch_id.hex()}.json"
    last_key_expires_ms = first.span.ends_ms - 1 + TTL_MS
    tend(keeper, last_key_expires_ms)
    assert name in epoch_files(keyring)
    tend(keeper, first.span.destroy_ms - 1)
    assert name in epoch_files(keyring)
    tend(keeper, first.span.destroy_ms)
    assert name not in epoch_files(keyring)
    with pytest.raises(KeyringError):
        keyring.read_epoch(first.epoch_id)


def test_a_janitor_that_was_dead_for_long_destroys_all_that_is_overdue_at_once(
    keyring: Keyring, store: Store, keeper: EpochKeeper
) -> None:
    tend(keeper, START_MS)
    old = epoch_files(keyring)
    later_ms = START_MS + 86_400_000
    tend(keeper_of(store, keyring), later_ms)
    assert not old & epoch_files(keyring)
    assert current_epoch(stored(store).epochs, later_ms) is not None


def test_a_restarted_janitor_goes_on_with_the_epochs_that_are_there(
    store: Store, keyring: Keyring, keeper: EpochKeeper
) -> None:
    tend(keeper, START_MS)
    before = stored(store).epochs
    tend(keeper_of(store, Keyring.open(keyring.path, KP)), START_MS + 1000)
    assert stored(store).epochs == before


def test_a_new_announcement_is_always_newer_even_when_the_clock_was_set_back(
    store: Store, keyring: Keyring, keeper: EpochKeeper
) -> None:
    tend(keeper, START_MS)
    first = stored(store)
    back_ms = START_MS - 2 * 86_400_000
    tend(keeper_of(store, keyring), back_ms)
    second = stored(store)
    assert second.issued_ms > first.issued_ms
    assert current_epoch(second.epochs, back_ms) is not None


def test_an_emptied_store_is_announced_to_again(store: Store, keeper: EpochKeeper) -> None:
    tend(keeper, START_MS)
    before = stored(store)
    store.rows("DELETE FROM announcements")
    tend(keeper, START_MS + 1000)
    assert stored(store).epochs == before.epochs


def test_an_old_announcement_that_somebody_put_back_is_replaced(store: Store, keeper: EpochKeeper) -> None:
    tend(keeper, START_MS)
    old_row = store.rows("SELECT digest, body, issued_ms FROM announcements")[0]
    tend(keeper, START_MS + EPOCH_MS)
    newer = stored(store)
    store.rows("UPDATE announcements SET digest = %s, body = %s, issued_ms = %s", *old_row)
    assert stored(store).epochs != newer.epochs
    tend(keeper, START_MS + EPOCH_MS + 1000)
    assert stored(store).epochs == newer.epochs


def test_a_foreign_announcement_under_this_name_is_replaced(store: Store, keeper: EpochKeeper) -> None:
    tend(keeper, START_MS)
    mallory = Identity.generate()
    forged = Announcement(KP, mallory.public_key, START_MS + 10**9, "x", ())
    with store.engine.begin() as connection:
        announcements.upsert_announcement(connection, forged, sign_announcement(forged, mallory))
    assert stored(store) == forged
    tend(keeper, START_MS + 1000)
    assert stored(store).public_key != mallory.public_key
    assert stored(store).issued_ms > forged.issued_ms


def test_a_keyring_that_the_store_does_not_know_this_kp_by_is_an_error_and_announces_nothing(
    store: Store, keyring: Keyring, keeper: EpochKeeper
) -> None:
    known = Identity.generate().public_key
    with store.engine.begin() as connection:
        pinned_identities.insert_pin(connection, KP, KP, known, START_MS)
    with pytest.raises(KeyringError) as caught:
        tend(keeper, START_MS)
    assert fingerprint(known) in str(caught.value)
    assert fingerprint(keyring.identity.public_key) in str(caught.value)
    assert store.count("announcements") == 0


def test_the_first_announcement_pins_this_kps_own_identity(store: Store, keyring: Keyring, keeper: EpochKeeper) -> None:
    tend(keeper, START_MS)
    with store.engine.connect() as connection:
        pin = pinned_identities.fetch_pin(connection, KP, KP)
    assert pin == pinned_identities.Pin(keyring.identity.public_key, None)


# --- epochs that cannot be read


def damage_current_epoch(keyring: Keyring, at_ms: int) -> Path:
    """Makes the file of the epoch for ``at_ms`` unreadable, as a disk's fault would."""
    for epoch_id in keyring.epoch_ids():
        span = keyring.read_epoch(epoch_id).span
        if span.starts_ms <= at_ms < span.ends_ms:
            path = keyring.path / "epochs" / f"{epoch_id.hex()}.json"
            path.write_bytes(b"\0" * path.stat().st_size)
            return path
    raise AssertionError("there is no epoch for that time")


def test_a_damaged_epoch_is_replaced_so_that_the_kp_can_be_sealed_to_again(
    store: Store, keyring: Keyring, keeper: EpochKeeper
) -> None:
    tend(keeper, START_MS)
    damage_current_epoch(keyring, START_MS)
    tend(keeper_of(store, keyring), START_MS + 1000)
    epoch = current_epoch(stored(store).epochs, START_MS + 1000)
    assert epoch is not None
    assert keyring.read_epoch(epoch.epoch_id).public() == epoch


def test_an_epoch_whose_file_is_gone_is_announced_no_longer_and_replaced(
    store: Store, keyring: Keyring, keeper: EpochKeeper
) -> None:
    tend(keeper, START_MS)
    damage_current_epoch(keyring, START_MS).unlink()
    tend(keeper, START_MS + 1000)
    announced = {epoch.epoch_id for epoch in stored(store).epochs}
    assert announced <= set(keyring.epoch_ids())
    assert current_epoch(stored(store).epochs, START_MS + 1000) is not None


def test_a_damaged_epoch_is_reported_once_and_not_every_second(
    store: Store, keyring: Keyring, keeper: EpochKeeper, capsys: pytest.CaptureFixture[str]
) -> None:
    tend(keeper, START_MS)
    damage_current_epoch(keyring, START_MS)
    restarted = keeper_of(store, keyring)
    capsys.readouterr()
    for second in range(1, 6):
        tend(restarted, START_MS + second * 1000)
    assert capsys.readouterr().out.count("epoch cannot be read") == 1


def test_no_log_line_of_a_damaged_epoch_holds_its_key(
    store: Store, keyring: Keyring, keeper: EpochKeeper, capsys: pytest.CaptureFixture[str]
) -> None:
    tend(keeper, START_MS)
    epoch_id = keyring.epoch_ids()[0]
    path = keyring.path / "epochs" / f"{epoch_id.hex()}.json"
    private = json.loads(path.read_text())["private_key"]
    path.write_text(path.read_text().replace("destroy_ms", "destroyed_ms"))
    tend(keeper_of(store, keyring), START_MS + 1000)
    captured = capsys.readouterr()
    assert "epoch cannot be read" in captured.out
    assert private[:32] not in captured.out + captured.err


def test_an_epoch_that_cannot_be_read_is_destroyed_too_once_nothing_sealed_to_it_can_be_alive(
    store: Store, keyring: Keyring, keeper: EpochKeeper
) -> None:
    # Restored from a backup with the wrong modes, say: refused, and still a private half on the disk.
    tend(keeper, START_MS)
    path = keyring.path / "epochs" / f"{keyring.epoch_ids()[0].hex()}.json"
    path.chmod(0o644)
    written_seconds = START_MS / 1000
    os.utime(path, (written_seconds, written_seconds))
    restarted = keeper_of(store, keyring)
    # It was made at most a lifetime and an epoch before its start, and is kept for a lifetime and half a minute.
    latest_ms = START_MS + (TTL_MS + EPOCH_MS) + EPOCH_MS + (TTL_MS + 30_000)
    tend(restarted, latest_ms - EPOCH_MS - 1000)
    assert path.exists()
    tend(restarted, latest_ms + EPOCH_MS)
    assert not path.exists()


def test_an_epoch_that_can_be_neither_read_nor_destroyed_stops_no_other_work(
    store: Store, keyring: Keyring, keeper: EpochKeeper
) -> None:
    # As another user's file would, a folder in its place refuses both.
    tend(keeper, START_MS)
    stray = keyring.path / "epochs" / f"{'0' * 32}.json"
    stray.mkdir(mode=0o700)
    os.utime(stray, (1, 1))
    later_ms = START_MS + 86_400_000
    tend(keeper, later_ms)
    assert current_epoch(stored(store).epochs, later_ms) is not None


def test_an_epoch_that_was_made_readable_again_is_used_again(
    store: Store, keyring: Keyring, keeper: EpochKeeper
) -> None:
    tend(keeper, START_MS)
    epoch_id = keyring.epoch_ids()[0]
    path = keyring.path / "epochs" / f"{epoch_id.hex()}.json"
    os.utime(path, (START_MS / 1000, START_MS / 1000))
    path.chmod(0o644)
    restarted = keeper_of(store, keyring)
    tend(restarted, START_MS + 1000)
    path.chmod(0o600)
    tend(restarted, START_MS + 2000)
    assert epoch_id in {epoch.epoch_id for epoch in stored(store).epochs}


def test_an_epoch_whose_file_went_away_between_two_lists_of_the_folder_ends_nothing(
    keyring: Keyring, keeper: EpochKeeper
) -> None:
    keeper.tend(START_MS, list_files=True)
    first = min((keyring.read_epoch(i) for i in keyring.epoch_ids()), key=lambda epoch: epoch.span.starts_ms)
    (keyring.path / "epochs" / f"{first.epoch_id.hex()}.json").unlink()
    keeper.tend(first.span.destroy_ms, list_files=False)


def test_without_a_look_at_the_folder_epochs_are_made_and_destroyed_in_time(
    keyring: Keyring, keeper: EpochKeeper
) -> None:
    keeper.tend(START_MS, list_files=True)
    first = min((keyring.read_epoch(i) for i in keyring.epoch_ids()), key=lambda epoch: epoch.span.starts_ms)
    known = epoch_files(keyring)
    keeper.tend(START_MS + EPOCH_MS, list_files=False)
    assert epoch_files(keyring) > known
    keeper.tend(first.span.destroy_ms, list_files=False)
    assert f"{first.epoch_id.hex()}.json" not in epoch_files(keyring)
