"""Facts about the keyring: who may read it, whose it is, and that a destroyed epoch is gone from the disk."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from skipbus.shared.crypto.epochs import EpochSpan, new_epoch_id
from skipbus.shared.crypto.hpke import HybridPrivateKey
from skipbus.shared.crypto.identity import Identity, fingerprint
from skipbus.shared.crypto.keyring import Keyring, PrivateEpoch, check_pinned_identity
from skipbus.shared.errors import KeyringError

KP = "KP_Alice"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "keyring"


@pytest.fixture
def keyring(folder: Path) -> Keyring:
    return Keyring.create(folder, KP)


def add_epoch(keyring: Keyring) -> PrivateEpoch:
    epoch = PrivateEpoch(new_epoch_id(), EpochSpan(1000, 2000, 3000), HybridPrivateKey.generate())
    keyring.write_epoch(epoch)
    return epoch


def epoch_file(keyring: Keyring, epoch: PrivateEpoch) -> Path:
    return keyring.path / "epochs" / f"{epoch.epoch_id.hex()}.json"


def all_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# --- making and opening


def test_a_keyring_opens_with_the_identity_that_it_was_made_with(keyring: Keyring, folder: Path) -> None:
    assert Keyring.open(folder, KP).identity.public_key == keyring.identity.public_key


def test_a_new_keyring_is_readable_by_its_owner_only_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        keyring = Keyring.create(folder, KP)
        add_epoch(keyring)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in all_files(folder)} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "epochs")} == {0o700}


def test_a_keyring_is_made_in_an_empty_folder_but_never_over_another(folder: Path) -> None:
    folder.mkdir()
    made = Keyring.create(folder, KP)
    with pytest.raises(KeyringError, match="is not empty"):
        Keyring.create(folder, KP)
    assert Keyring.open(folder, KP).identity.public_key == made.identity.public_key


def test_a_missing_keyring_is_an_error_and_never_a_silent_new_identity(folder: Path) -> None:
    with pytest.raises(KeyringError, match="skipctl keyring init"):
        Keyring.open(folder, KP)
    assert not folder.exists()


def test_a_keyring_whose_making_was_cut_short_is_refused(keyring: Keyring, folder: Path) -> None:
    (folder / "keyring.json").unlink()
    with pytest.raises(KeyringError, match="there is no keyring"):
        Keyring.open(folder, KP)


@pytest.mark.parametrize("other", ["KP_Bob", "kp_alice", "KP_Alice2"])
def test_another_kps_keyring_is_refused_by_both_names(keyring: Keyring, folder: Path, other: str) -> None:
    with pytest.raises(KeyringError, match=f"'{KP}', not to '{other}'"):
        Keyring.open(folder, other)


@pytest.mark.parametrize("name", [".", "epochs", "identity.pem", "keyring.json"])
@pytest.mark.parametrize("bits", [0o040, 0o020, 0o004, 0o002, 0o010, 0o001])
def test_a_mode_that_lets_others_in_is_refused_with_the_command_that_mends_it(
    keyring: Keyring, folder: Path, name: str, bits: int
) -> None:
    path = folder / name
    path.chmod(stat.S_IMODE(path.stat().st_mode) | bits)
    with pytest.raises(KeyringError, match=r"chmod (600|700) "):
        Keyring.open(folder, KP)


@pytest.mark.parametrize("name", ["identity.pem", "epochs"])
def test_a_keyring_of_which_a_part_is_missing_is_refused(keyring: Keyring, folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    with pytest.raises(KeyringError, match=r"cannot be read"):
        Keyring.open(folder, KP)


@pytest.mark.parametrize("content", [b"", b"rubbish", b"[]", b"{", b'"text"', b"\xff\xfe"])
def test_a_damaged_description_is_refused(keyring: Keyring, folder: Path, content: bytes) -> None:
    (folder / "keyring.json").write_bytes(content)
    with pytest.raises(KeyringError, match="is damaged: restore it"):
        Keyring.open(folder, KP)


def test_a_keyring_of_another_version_is_refused(keyring: Keyring, folder: Path) -> None:
    about = json.loads((folder / "keyring.json").read_text())
    (folder / "keyring.json").write_text(json.dumps(about | {"version": 2}))
    with pytest.raises(KeyringError, match="has version 2"):
        Keyring.open(folder, KP)


@pytest.mark.parametrize("content", [b"", b"rubbish", b"-----BEGIN PRIVATE KEY-----\n"])
def test_a_damaged_identity_is_refused(keyring: Keyring, folder: Path, content: bytes) -> None:
    (folder / "identity.pem").write_bytes(content)
    with pytest.raises(KeyringError, match=r"identity\.pem is damaged"):
        Keyring.open(folder, KP)


def test_an_identity_that_was_put_in_the_others_place_is_refused(keyring: Keyring, folder: Path) -> None:
    (folder / "identity.pem").write_bytes(Identity.generate().to_pem())
    with pytest.raises(KeyringError, match="is not the identity"):
        Keyring.open(folder, KP)


@pytest.mark.parametrize("name", [".", "epochs", "identity.pem", "keyring.json"])
def test_a_part_that_belongs_to_another_user_is_refused(
    keyring: Keyring, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    me = os.geteuid()
    if me == 0:
        os.chown(folder / name, 12_345, 12_345)
    else:  # only root can give a file away; anyone else can be taken for another user
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(KeyringError, match=r"belongs to user \d+, not to the one"):
        Keyring.open(folder, KP)


# --- epochs


def test_an_epoch_is_read_as_it_was_written_and_by_a_keyring_opened_anew(keyring: Keyring) -> None:
    epoch = add_epoch(keyring)
    again = Keyring.open(keyring.path, KP).read_epoch(epoch.epoch_id)
    assert again.public() == epoch.public()
    assert again.private_key.to_bytes() == epoch.private_key.to_bytes()


def test_the_keyring_knows_the_epochs_whose_private_half_is_there(keyring: Keyring) -> None:
    assert keyring.epoch_ids() == []
    epochs = [add_epoch(keyring) for _ in range(3)]
    assert set(keyring.epoch_ids()) == {epoch.epoch_id for epoch in epochs}


@pytest.mark.parametrize("name", ["README.json", "notes.txt", f".{'0' * 32}.json.77", "z" * 32 + ".json"])
def test_a_stray_file_is_no_epoch(keyring: Keyring, name: str) -> None:
    epoch = add_epoch(keyring)
    (keyring.path / "epochs" / name).write_text("{}")
    assert keyring.epoch_ids() == [epoch.epoch_id]


def test_an_epoch_that_never_was_here_cannot_be_read(keyring: Keyring) -> None:
    with pytest.raises(KeyringError, match="is not in the keyring"):
        keyring.read_epoch(new_epoch_id())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 300,
        b"{}",
        b"[]",
        b'{"starts_ms": 1, "ends_ms": 2, "destroy_ms": 3}',
        b'{"starts_ms": 1, "ends_ms": 2, "destroy_ms": 3, "private_key": "00"}',
        b'{"starts_ms": 1, "ends_ms": 2, "destroy_ms": 3, "private_key": "zz"}',
        b'{"starts_ms": 1, "ends_ms": 2, "destroy_ms": 3, "private_key": 5}',
        b'{"starts_ms": null, "ends_ms": 2, "destroy_ms": 3, "private_key": "00"}',
    ],
)
def test_a_damaged_epoch_is_a_keyring_error(keyring: Keyring, content: bytes) -> None:
    epoch = add_epoch(keyring)
    epoch_file(keyring, epoch).write_bytes(content)
    with pytest.raises(KeyringError, match="is damaged: delete this file"):
        keyring.read_epoch(epoch.epoch_id)


def test_an_epoch_that_others_can_read_is_refused(keyring: Keyring) -> None:
    epoch = add_epoch(keyring)
    epoch_file(keyring, epoch).chmod(0o644)
    with pytest.raises(KeyringError, match="may be read by others"):
        keyring.read_epoch(epoch.epoch_id)


def test_a_damaged_key_shows_in_no_message(keyring: Keyring) -> None:
    epoch = add_epoch(keyring)
    private = epoch.private_key.to_bytes().hex()
    path = epoch_file(keyring, epoch)
    path.write_text(path.read_text().replace(private, private[:-2]))
    with pytest.raises(KeyringError) as caught:
        keyring.read_epoch(epoch.epoch_id)
    assert private[:16] not in f"{caught.value!r} {caught.value.__cause__!r}"
    assert private[:16] not in f"{epoch!r} {keyring!r}"


def test_a_write_that_fails_leaves_no_half_written_epoch(keyring: Keyring, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        add_epoch(keyring)
    assert keyring.epoch_ids() == []


# --- destruction


def test_a_destroyed_epoch_is_unreadable_and_its_file_gone(keyring: Keyring) -> None:
    epoch, kept = add_epoch(keyring), add_epoch(keyring)
    keyring.destroy_epoch(epoch.epoch_id)
    assert not epoch_file(keyring, epoch).exists()
    assert keyring.epoch_ids() == [kept.epoch_id]
    with pytest.raises(KeyringError, match="is not in the keyring"):
        keyring.read_epoch(epoch.epoch_id)
    assert keyring.read_epoch(kept.epoch_id).public() == kept.public()


def test_no_file_of_the_keyring_holds_a_destroyed_private_half(keyring: Keyring) -> None:
    epoch = add_epoch(keyring)
    private = epoch.private_key.to_bytes()
    assert any(private.hex().encode() in path.read_bytes() for path in all_files(keyring.path))
    keyring.destroy_epoch(epoch.epoch_id)
    for path in all_files(keyring.path):
        assert private.hex().encode() not in path.read_bytes()
        assert private not in path.read_bytes()


def test_a_private_half_is_overwritten_on_the_disk_before_its_file_is_removed(keyring: Keyring) -> None:
    epoch = add_epoch(keyring)
    path = epoch_file(keyring, epoch)
    # A second name for the same blocks shows what is left in them when the first name is gone.
    witness = keyring.path.parent / "witness"
    os.link(path, witness)
    size = path.stat().st_size
    keyring.destroy_epoch(epoch.epoch_id)
    assert not path.exists()
    assert witness.read_bytes() == bytes(size)


def test_the_overwriting_is_on_the_disk_before_the_unlinking_and_the_unlinking_before_the_return(
    keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = add_epoch(keyring)
    path = epoch_file(keyring, epoch)
    private = epoch.private_key.to_bytes().hex().encode()
    synced: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            synced.append("folder while the file is there" if path.exists() else "folder without the file")
        else:
            synced.append("key" if private in path.read_bytes() else "overwritten")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    keyring.destroy_epoch(epoch.epoch_id)
    assert synced == ["overwritten", "overwritten", "folder without the file"]


# --- the pin of one's own identity


def test_a_store_that_knows_the_kp_by_this_identity_or_not_at_all_is_fine(keyring: Keyring) -> None:
    check_pinned_identity(keyring, None)
    check_pinned_identity(keyring, keyring.identity.public_key)


def test_a_store_that_knows_the_kp_by_another_identity_is_an_error_with_both_fingerprints(
    keyring: Keyring,
) -> None:
    pinned = Identity.generate().public_key
    with pytest.raises(KeyringError) as caught:
        check_pinned_identity(keyring, pinned)
    for words in (fingerprint(pinned), fingerprint(keyring.identity.public_key), "skipctl identity accept"):
        assert words in str(caught.value)


def test_a_keyring_that_is_taken_is_whole_in_its_place_and_nowhere_else(tmp_path: Path) -> None:
    made = Keyring.create(tmp_path / "made", "KP_A")
    taken = Keyring.take(tmp_path / "made", tmp_path / "place", "KP_A")
    assert taken.identity.public_key == made.identity.public_key
    assert Keyring.open(tmp_path / "place", "KP_A").identity.public_key == made.identity.public_key
    assert [path for path in (tmp_path / "made").rglob("*") if path.is_file()] == []


def test_taking_a_keyring_again_leaves_it_as_it_is(tmp_path: Path) -> None:
    Keyring.create(tmp_path / "made", "KP_A")
    first = Keyring.take(tmp_path / "made", tmp_path / "place", "KP_A")
    again = Keyring.take(tmp_path / "made", tmp_path / "place", "KP_A")
    assert again.identity.public_key == first.identity.public_key


@pytest.mark.parametrize(
    "missing", ["place/keyring.json", "place/identity.pem", "made/identity.pem", "made/keyring.json"]
)
def test_a_move_that_was_cut_short_is_ended_by_the_next_one(tmp_path: Path, missing: str) -> None:
    """The kill came after everything was copied, but for what is missing in the place; or when it was destroyed."""
    made = Keyring.create(tmp_path / "made", "KP_A")
    shutil.copytree(tmp_path / "made", tmp_path / "place")
    if missing == "place/identity.pem":
        (tmp_path / "place" / "keyring.json").unlink()
    if missing == "made/keyring.json":
        (tmp_path / "made" / "identity.pem").unlink()
    (tmp_path / missing).unlink()
    taken = Keyring.take(tmp_path / "made", tmp_path / "place", "KP_A")
    assert taken.identity.public_key == made.identity.public_key
    assert [path for path in (tmp_path / "made").rglob("*") if path.is_file()] == []


def test_where_there_is_no_keyring_to_take_none_is_made(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    with pytest.raises(KeyringError, match=f"there is no keyring in {tmp_path / 'place'}, and none to move there"):
        Keyring.take(tmp_path / "made", tmp_path / "place", "KP_A")
    assert not (tmp_path / "place").exists()


def test_another_identity_than_the_one_in_its_place_is_not_taken(tmp_path: Path) -> None:
    for name in ("made", "place"):
        Keyring.create(tmp_path / name, "KP_A")
    with pytest.raises(KeyringError, match="another one"):
        Keyring.take(tmp_path / "made", tmp_path / "place", "KP_A")
    assert (tmp_path / "made" / "identity.pem").exists()
