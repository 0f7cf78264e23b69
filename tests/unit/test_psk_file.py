"""The file of pre-shared keys: what it may hold, and that its faults are reported by line, without keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from skipbus.shared.protocol.psk_file import PskFileError, parse_psk_file, read_psk_file, shown_identity

KEY = "0123456789abcdef" * 4


def parse(text: str | bytes) -> dict[bytes, bytes]:
    return dict(parse_psk_file(text.encode() if isinstance(text, str) else text, "psk.txt"))


def faults(text: str | bytes) -> list[str]:
    with pytest.raises(PskFileError) as caught:
        parse(text)
    return str(caught.value).splitlines()


def test_identities_and_keys_are_read_as_stunnel_reads_them() -> None:
    assert parse(f"cisco:{KEY}\nr 2:{KEY.upper()}ff\n") == {
        b"cisco": bytes.fromhex(KEY),
        b"r 2": bytes.fromhex(KEY + "ff"),
    }


@pytest.mark.parametrize("text", ["", "\n\n", "# a comment\n; another: one\n   \n"])
def test_blank_lines_and_comments_are_passed_over(text: str) -> None:
    assert parse(text) == {}
    assert parse(f"{text}\ncisco:{KEY}") == {b"cisco": bytes.fromhex(KEY)}


def test_windows_line_ends_and_a_byte_order_mark_are_accepted() -> None:
    assert parse(f"\ufeffcisco:{KEY}\r\n") == {b"cisco": bytes.fromhex(KEY)}


@pytest.mark.parametrize("identity", ["x", "x" * 127, "é" * 63, "a@b.example", "{}'\""])
def test_an_identity_has_1_to_127_bytes(identity: str) -> None:
    assert list(parse(f"{identity}:{KEY}\n")) == [identity.encode()]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f":{KEY}", "the identity is empty"),
        (f"{'x' * 128}:{KEY}", "the identity has 128 bytes"),
        (f"{'é' * 64}:{KEY}", "the identity has 128 bytes"),
        (f" cisco:{KEY}", "starts or ends with a space"),
        (f"cis\x00co:{KEY}", "not printable"),
        (b"\xff\xfe:" + KEY.encode(), "not UTF-8"),
        ("cisco", "not written as identity:hex"),
        ("cisco:", "not an even number of hexadecimal digits"),
        (f"cisco:{KEY}0", "not an even number of hexadecimal digits"),
        (f"cisco:0x{KEY}", "not an even number of hexadecimal digits"),
        (f"cisco:zz{KEY}", "not an even number of hexadecimal digits"),
        (f"cisco:{KEY[2:]}", "the key has 248 bits; at least 256 are needed"),
        (f"cisco:{KEY * 9}", "the key has 2304 bits; at most 2048 are allowed"),
    ],
    ids=str,
)
def test_a_bad_line_is_refused_with_its_number_and_without_its_key(line: str | bytes, reason: str) -> None:
    octets = line.encode() if isinstance(line, str) else line
    (fault,) = faults(b"# first\n" + octets + b"\n")
    assert fault.startswith("psk.txt, line 2: ")
    assert reason in fault
    assert KEY[2:] not in fault


def test_a_second_line_for_one_identity_is_refused_with_the_first_one_s_number() -> None:
    (fault,) = faults(f"a:{KEY}\n\nb:{KEY}\na:{KEY}\n")
    assert fault == "psk.txt, line 4: the identity 'a' stands in line 1 already"


def test_all_faults_are_told_together() -> None:
    assert len(faults(f"a\nb:00\nc:{KEY}\n:{KEY}\n")) == 3


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o601, 0o666])
def test_a_file_that_others_may_open_is_refused(open_folder: Path, mode: int) -> None:
    path = open_folder / "psk.txt"
    path.write_text(f"cisco:{KEY}\n")
    path.chmod(mode)
    with pytest.raises(PskFileError, match="open to every user of this host"):
        read_psk_file(path)


def test_a_file_in_a_folder_that_others_cannot_enter_is_read_whatever_its_mode(open_folder: Path) -> None:
    path = open_folder / "psk.txt"
    path.write_text(f"cisco:{KEY}\n")
    path.chmod(0o444)
    open_folder.chmod(0o750)
    assert len(read_psk_file(path)) == 1


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400])
def test_a_file_that_its_owner_and_group_may_read_is_read(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "psk.txt"
    path.write_text(f"cisco:{KEY}\n")
    path.chmod(mode)
    assert set(read_psk_file(path)) == {b"cisco"}


def test_a_missing_file_and_a_folder_are_refused_with_their_path(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(PskFileError, match=str(path)):
            read_psk_file(path)


def test_keys_stand_in_no_repr(tmp_path: Path) -> None:
    path = tmp_path / "psk.txt"
    path.write_text(f"cisco:{KEY}\n")
    path.chmod(0o600)
    assert repr(read_psk_file(path)) == "<1 pre-shared keys>"


def test_an_identity_is_shown_in_printable_characters_whatever_it_holds() -> None:
    for identity in (b"\xff\x00\n", b"x" * 5000, "\u202eevil\u2028".encode()):
        text = shown_identity(identity)
        assert text.isprintable()
        assert len(text) < 800
