"""Facts about what janitor and syncer do each second, of the tasks themselves and without their processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from skipbus.services.janitor.__main__ import Janitor
from skipbus.services.syncer.leader import Leader, Reservation, SequenceNumbers
from skipbus.services.syncer.stock_expiry import StockExpiry
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import EpochSpan, new_epoch_id
from skipbus.shared.crypto.hpke import HybridPrivateKey
from skipbus.shared.crypto.keyring import Keyring, PrivateEpoch
from skipbus.shared.errors import StoreRefused
from skipbus.shared.settings.peers import identity_line
from tests.integration.key_providers import Store, settings_for

KP, PEER = "KP_Alice", "KP_Bob"


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return Keyring.create(tmp_path / "keyring", KP)


def janitor_of(store: Store, keyring: Keyring) -> Janitor:
    return Janitor(settings_for(store.database, KP, keyring.path), store.engine, keyring, lambda: False)


def recorded(store: Store, expires_ms: int) -> None:
    number = store.count("key_records") + 1
    store.rows(
        "INSERT INTO key_records VALUES (%s, %s, %s, %s, 256, 'w', 'n', 's', '')",
        *(KP, expires_ms, bytes([number]) * 16, PEER),
    )


async def test_a_janitor_zeroizes_at_each_tick_what_has_expired(store: Store, keyring: Keyring) -> None:
    janitor = janitor_of(store, keyring)
    try:
        recorded(store, now_ms() + 3_600_000)
        for _ in range(3):
            recorded(store, now_ms() - 1)
            await janitor.tick()
            assert store.count("key_records") == 1
        assert store.rows("SELECT items FROM outbox") == [(1,), (1,), (1,)]
    finally:
        janitor.close()


async def test_a_janitor_zeroizes_though_its_keyring_cannot_be_written(store: Store, keyring: Keyring) -> None:
    janitor = janitor_of(store, keyring)
    (keyring.path / "epochs").rmdir()
    (keyring.path / "epochs").touch()
    recorded(store, now_ms() - 1)
    try:
        with pytest.raises(OSError, match="epochs"):
            await janitor.tick()
        assert store.count("key_records") == 0
    finally:
        janitor.close()


async def test_a_sweep_that_the_store_refuses_is_not_repeated_each_second(store: Store, keyring: Keyring) -> None:
    janitor = janitor_of(store, keyring)
    try:
        await janitor.tick()
        janitor._ticks = 15
        with store.without_table("withdrawn_keys"):
            with pytest.raises(StoreRefused):
                await janitor.tick()
            recorded(store, now_ms() - 1)
            await janitor.tick()
        assert store.count("key_records") == 0
    finally:
        janitor.close()


async def test_a_janitor_announces_at_the_next_tick_to_a_store_that_was_emptied(store: Store, keyring: Keyring) -> None:
    janitor = janitor_of(store, keyring)
    try:
        await janitor.tick()
        await janitor.tick()
        store.rows("DELETE FROM announcements")
        await janitor.tick()
        assert store.count("announcements") == 1
    finally:
        janitor.close()


async def test_a_janitor_that_is_elected_again_knows_the_epochs_that_another_has_made(
    store: Store, keyring: Keyring
) -> None:
    janitor = janitor_of(store, keyring)
    try:
        await janitor.tick()
        await janitor.tick()
        made, later_ms = new_epoch_id(), now_ms() + 86_400_000
        span = EpochSpan(later_ms, later_ms + 600_000, later_ms + 7_200_000)
        keyring.write_epoch(PrivateEpoch(made, span, HybridPrivateKey.generate()))
        # As though it had been stopped for so long that its lease was over.
        janitor._election._valid_until = 0.0
        await janitor.tick()
        assert made in janitor._epochs._epochs
    finally:
        janitor.close()


async def test_stock_that_grows_too_old_is_dropped_and_its_age_is_not_asked_for_each_second(
    store: Store, tmp_path: Path, keyring: Keyring
) -> None:
    peers = tmp_path / "skipbus.toml"
    identity = Keyring.create(tmp_path / "bob", PEER).identity
    peers.write_text(
        f'[[peers]]\nsystem_id = "{PEER}"\nlink = "bus"\nidentity = "{identity_line(identity.public_key)}"\n'
    )
    settings = settings_for(
        store.database,
        KP,
        keyring.path,
        SKIP_CONFIG_FILE=str(peers),
        SKIP_KEY_TTL_SECONDS="160",
        RABBITMQ_URL="amqp://guest:guest@localhost/",
    )
    changes = list[bool]()
    leader = Leader(store.engine, KP, Reservation(store.engine, KP, SequenceNumbers()))
    watch = StockExpiry(settings, store.engine, leader, lambda: changes.append(True))
    try:
        stocked(store, 1, now_ms() + 70_000)
        stocked(store, 2, now_ms() + 120_000)
        await watch.tick()
        # Not while another syncer may be the elected one.
        assert store.count("stock") == 2
        await leader.tick()
        await watch.tick()
        assert (store.count("stock"), changes) == (1, [True])
        stocked(store, 3, now_ms() + 70_000)
        await watch.tick()
        assert store.count("stock") == 2
        # As though half of ten seconds had gone by, for which a key no longer counts before it is too old.
        watch._check_at -= 5.0
        await watch.tick()
        assert (store.count("stock"), changes) == (1, [True, True])
    finally:
        leader.close()


def stocked(store: Store, number: int, expires_ms: int) -> None:
    store.rows(
        "INSERT INTO stock VALUES (%s, %s, %s, %s, 256, 'w', 'n', 's', 't', 1)",
        *(KP, PEER, expires_ms, bytes([number]) * 16),
    )
