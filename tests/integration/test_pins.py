"""A pin in the keyring that is damaged, or differs from the store's, costs its own peer and nobody else."""

from __future__ import annotations

import pytest

from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.errors import SkipbusError
from skipbus.shared.peer_directory import PIN_REREAD_MS
from tests.integration.key_providers import KeyProvider, Store, announced


@pytest.fixture
def kps(store: Store) -> list[KeyProvider]:
    return announced(store, "KP_Alice", "KP_Bob", "KP_Carol", "KP_Alice2")[:3]


def look_again(kp: KeyProvider, times: int = 1) -> None:
    """As after so many of the times in which pins are not read again."""
    kp.directory.refresh(now_ms() + times * PIN_REREAD_MS)


def test_a_damaged_pin_harms_only_its_peer_until_an_operator_repairs_it(kps: list[KeyProvider]) -> None:
    alice, bob, carol = kps
    alice.refresh()
    alice.keyring.pins._file("KP_Bob").write_bytes(b"")
    look_again(alice)
    assert alice.directory.get("KP_Bob") is None
    with pytest.raises(SkipbusError, match="KP_Bob"):
        alice.issue(bob)
    (key,) = alice.issue(carol)
    assert carol.claim(key.key_id, alice).key == key.key

    alice.keyring.pins.replace("KP_Bob", bob.keyring.identity.public_key)
    look_again(alice, 2)
    (key,) = alice.issue(bob)
    assert bob.claim(key.key_id, alice).key == key.key


def test_a_pin_that_was_changed_in_the_store_alone_changes_nothing(store: Store, kps: list[KeyProvider]) -> None:
    alice, bob, _ = kps
    alice.refresh()
    store.rows(
        "UPDATE pinned_identities SET public_key = %s WHERE observer_id = 'KP_Alice' AND subject_id = 'KP_Bob'",
        Identity.generate().public_key,
    )
    look_again(alice)
    assert alice.directory.pin("KP_Bob") == bob.keyring.identity.public_key
    (key,) = alice.issue(bob)
    assert bob.claim(key.key_id, alice).key == key.key
