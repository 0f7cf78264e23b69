"""`skipctl psk add|list|remove` and `skipctl cert init`, as an operator runs them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cryptography import x509

from skipbus.ctl.__main__ import main
from skipbus.shared.protocol.psk_file import read_psk_file


def psk(path: Path, *arguments: str) -> int:
    return main(["psk", *arguments, "--file", str(path)])


def test_add_makes_a_key_of_256_bits_and_prints_what_to_paste_into_ios_xe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "psk.txt"
    assert psk(path, "add", "router-1", "--server", "192.0.2.7", "--port", "9443") == 0
    key = read_psk_file(path)[b"router-1"]
    assert len(key) == 32
    assert capsys.readouterr().out.splitlines()[2:] == [
        "! IOS XE, in configuration mode. The key is shown this once.",
        "crypto skip-client SKIP",
        " server ipv4 192.0.2.7 port 9443",
        f" psk id router-1 key hex {key.hex()}",
    ]
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_ipv6_server_is_written_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert psk(tmp_path / "psk.txt", "add", "r", "--server", "2001:db8::7") == 0
    assert " server ipv6 2001:db8::7 port 8443" in capsys.readouterr().out


def test_a_server_that_is_named_is_written_as_a_name_and_the_port_is_the_configured_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKIP_TLS_PORT", "9443")
    assert psk(tmp_path / "psk.txt", "add", "r", "--server", "kp1.example.net") == 0
    assert " server fqdn kp1.example.net port 9443" in capsys.readouterr().out


def test_list_shows_identities_and_no_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "psk.txt"
    for name in ("router-1", "router-2"):
        psk(path, "add", name)
    capsys.readouterr()
    assert psk(path, "list") == 0
    output = capsys.readouterr().out
    assert output == "router-1  256 bits\nrouter-2  256 bits\n"
    assert not re.search("[0-9a-f]{16}", output)


def test_remove_takes_one_line_and_leaves_comments_blanks_and_the_mode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "psk.txt"
    path.write_text(f"# first\n\na:{'ab' * 32}\n; second\nb:{'cd' * 32}\n")
    path.chmod(0o640)
    assert psk(path, "remove", "a") == 0
    assert path.read_text() == f"# first\n\n; second\nb:{'cd' * 32}\n"
    assert path.stat().st_mode & 0o777 == 0o640
    assert psk(path, "remove", "a") == 1
    assert "no key for 'a'" in capsys.readouterr().err


@pytest.mark.parametrize("identity", ["", "x" * 128, "a:b", "#a", " a", "a\nb"], ids=repr)
def test_an_identity_that_the_file_cannot_hold_is_refused_and_no_file_made(tmp_path: Path, identity: str) -> None:
    assert psk(tmp_path / "psk.txt", "add", identity) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_identity_is_added_once(tmp_path: Path) -> None:
    path = tmp_path / "psk.txt"
    assert psk(path, "add", "router-1") == 0
    before = path.read_bytes()
    assert psk(path, "add", "router-1") == 1
    assert path.read_bytes() == before


def test_a_lab_s_certificates_are_its_owner_s_alone_and_never_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lab"
    command = ["cert", "init", str(folder), "--host", "kp.example", "--host", "192.0.2.7", "--client", "router-1"]
    assert main(command) == 0
    assert f"SKIP_TLS_CERT_FILE={folder}/rsa.pem,{folder}/ecdsa.pem" in capsys.readouterr().out
    assert {path.name for path in folder.glob("*.key")} == {"ca.key", "rsa.key", "ecdsa.key", "router-1.key"}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.glob("*.key"))
    names = x509.load_pem_x509_certificate((folder / "rsa.pem").read_bytes()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["kp.example"]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main(command) == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
