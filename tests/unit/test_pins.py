"""Facts about pins in the keyring: the first one stays, and a file that is no pin of this peer is nobody's word."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from skipbus.shared.crypto.identity import PUBLIC_KEY_BYTES
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.crypto.pins import PinBook
from skipbus.shared.errors import KeyringError

FIRST, SECOND = b"1" * PUBLIC_KEY_BYTES, b"2" * PUBLIC_KEY_BYTES
LEARN = """
import sys
from pathlib import Path
from skipbus.shared.crypto.pins import PinBook
key = bytes([int(sys.argv[2])]) * 2592
print("ready", flush=True)
sys.stdin.readline()
print(PinBook(Path(sys.argv[1])).learn("KP_Bob", key).hex())
"""


@pytest.fixture
def book(tmp_path: Path) -> PinBook:
    return PinBook(tmp_path / "pins")


def file_of(book: PinBook, system_id: str) -> Path:
    return book._file(system_id)


def test_nobody_is_pinned_before_the_first_sight(book: PinBook) -> None:
    assert book.get("KP_Bob") is None


def test_the_first_identity_stays_whatever_is_learned_later(book: PinBook) -> None:
    assert book.learn("KP_Bob", FIRST) == FIRST
    assert book.learn("KP_Bob", SECOND) == FIRST
    assert PinBook(file_of(book, "KP_Bob").parent).get("KP_Bob") == FIRST


def test_an_operators_word_replaces_it(book: PinBook) -> None:
    book.learn("KP_Bob", FIRST)
    book.replace("KP_Bob", SECOND)
    assert book.get("KP_Bob") == SECOND


def test_pins_are_their_owners_alone_and_nothing_else_is_left_in_the_folder(book: PinBook) -> None:
    book.learn("KP_Bob", FIRST)
    book.learn("KP_Bob", SECOND)
    book.replace("KP_Bob", SECOND)
    (file,) = file_of(book, "KP_Bob").parent.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("system_id", ["../../identity", "/etc/passwd", "a/b", ".", "KP Bob", "x" * 64])
def test_a_hostile_name_stays_in_the_folder(book: PinBook, tmp_path: Path, system_id: str) -> None:
    book.learn(system_id, FIRST)
    assert book.get(system_id) == FIRST
    assert [path.parent for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "pins"]


def pin_text(system_id: str, public_key: str) -> bytes:
    return json.dumps({"system_id": system_id, "public_key": public_key}).encode()


DAMAGED = {
    "empty": b"",
    "cut off": pin_text("KP_Bob", FIRST.hex())[:-200],
    "no object": b"[]",
    "no key": b'{"system_id": "KP_Bob"}',
    "an empty key": pin_text("KP_Bob", ""),
    "half a key": pin_text("KP_Bob", FIRST.hex()[:PUBLIC_KEY_BYTES]),
    "a key that is no text": b'{"system_id": "KP_Bob", "public_key": 5}',
    "no hex": pin_text("KP_Bob", "z" * 2 * PUBLIC_KEY_BYTES),
    "another peer's": pin_text("KP_Carol", FIRST.hex()),
    "random": secrets.token_bytes(300),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_pin_is_an_error_and_never_a_first_sight_again(book: PinBook, text: bytes) -> None:
    book.learn("KP_Bob", FIRST)
    book.learn("KP_Carol", SECOND)
    file_of(book, "KP_Bob").write_bytes(text)
    message = r"the pin of KP_Bob in .* cannot be read: .*skipctl identity accept KP_Bob"
    with pytest.raises(KeyringError, match=message):
        book.get("KP_Bob")
    with pytest.raises(KeyringError, match=message):
        book.learn("KP_Bob", SECOND)
    assert file_of(book, "KP_Bob").read_bytes() == text
    assert book.get("KP_Carol") == SECOND
    book.replace("KP_Bob", FIRST)
    assert book.get("KP_Bob") == FIRST


def test_a_folder_that_cannot_be_made_is_an_error_that_names_the_peer(tmp_path: Path) -> None:
    (tmp_path / "pins").write_text("a file")
    with pytest.raises(KeyringError, match="KP_Bob"):
        PinBook(tmp_path / "pins").learn("KP_Bob", FIRST)


def test_processes_that_learn_at_once_agree(tmp_path: Path) -> None:
    for round_number in range(3):
        folder = tmp_path / f"pins-{round_number}"
        learners = [
            subprocess.Popen(
                [sys.executable, "-c", LEARN, folder, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for n in range(1, 5)
        ]
        for learner in learners:
            assert learner.stdout is not None
            assert learner.stdout.readline() == "ready\n"
        for learner in learners:
            assert learner.stdin is not None
            learner.stdin.write("\n")
            learner.stdin.flush()
        learned = {learner.communicate()[0] for learner in learners}
        assert len(learned) == 1
        pinned = PinBook(folder).get("KP_Bob")
        assert pinned is not None
        assert learned == {pinned.hex() + "\n"}


def test_nothing_is_written_into_the_folder_of_a_lost_keyring(tmp_path: Path) -> None:
    # A process goes on for a while; what it left there would pass for a keyring, and none could be restored or made.
    keyring = Keyring.create(tmp_path / "keyring", "KP_Alice")
    keyring.pins.learn("KP_Bob", FIRST)
    shutil.rmtree(keyring.path)
    keyring.path.mkdir()
    for write in (keyring.pins.learn, keyring.pins.replace):
        with pytest.raises(KeyringError, match="the keyring is gone"):
            write("KP_Bob", FIRST)
    assert not list(keyring.path.iterdir())
