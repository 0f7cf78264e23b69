"""Who is refused at the TLS port, and that the log says why in a line that a person can act on."""

from __future__ import annotations

import secrets
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sandbox.ports import LOOPBACK
from tests.system.tls_api import TlsApi, curl, expired_certificate, openssl, s_client, tlslite_psk
from tests.waiting import wait_for

HANDSHAKE_TIMEOUT_SECONDS = 1.0
MAX_PER_ADDRESS = 40


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsApi]:
    """Pre-shared keys and client certificates on one port, with little patience."""
    impatient = {
        "SKIP_TLS_HANDSHAKE_TIMEOUT_SECONDS": str(HANDSHAKE_TIMEOUT_SECONDS),
        "SKIP_HEADER_TIMEOUT_SECONDS": "1",
        "SKIP_MAX_CONNECTIONS_PER_ADDRESS": str(MAX_PER_ADDRESS),
    }
    with TlsApi(tmp_path_factory.mktemp("tls"), impatient) as made:
        yield made


def rejected(api: TlsApi, *arguments: str) -> tuple[str, str]:
    """What s_client printed and the reason in the log."""
    before = api.refusals()
    seen = s_client(api.port, *arguments)
    assert not seen.served, seen.output
    line = api.refusal(before)
    assert line["client"] == LOOPBACK
    return seen.output, line["reason"]


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_a_wrong_key_is_told_from_an_unknown_identity(api: TlsApi, version: str) -> None:
    _, reason = rejected(api, version, *api.psk(key_hex=secrets.token_hex(32)))
    assert reason == f"wrong key for the PSK identity '{api.tls.psk_identity}'"


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
@pytest.mark.parametrize(
    ("identity", "expected"),
    [
        ("nobody", "unknown PSK identity 'nobody'"),
        ("x" * 127, f"unknown PSK identity '{'x' * 127}'"),
        ("ro\nuter\x1b[31m", "unknown PSK identity 'ro\\nuter\\x1b[31m'"),
        ("é", "unknown PSK identity 'é'"),
    ],
    ids=["unknown", "long", "control characters", "not ASCII"],
)
def test_an_unknown_identity_is_named(api: TlsApi, version: str, identity: str, expected: str) -> None:
    output, reason = rejected(api, version, "-cipher", "PSK", *api.psk(identity=identity))
    assert reason == expected
    assert "unknown psk identity" in output


def test_an_empty_identity_is_refused_in_tls_1_2(api: TlsApi) -> None:
    before = api.refusals()
    command = [
        "openssl",
        "s_client",
        "-connect",
        f"{LOOPBACK}:{api.port}",
        "-tls1_2",
        "-cipher",
        "PSK",
        "-psk_identity",
    ]
    subprocess.run([*command, "", "-psk", api.tls.psk_hex], input=b"", capture_output=True, timeout=20, check=False)
    assert api.refusal(before)["reason"] == "empty PSK identity"


def hello_with_an_empty_identity() -> bytes:
    """A ClientHello of TLS 1.3 by hand: no client offers an empty identity, which RFC 8446 forbids (4.2.11)."""

    def sized(size_format: str, octets: bytes) -> bytes:
        return struct.pack(size_format, len(octets)) + octets

    extensions = {
        43: b"\x02\x03\x04",  # TLS 1.3
        10: sized(">H", b"\x00\x1d"),  # X25519
        13: sized(">H", b"\x08\x04"),
        51: sized(">H", b"\x00\x1d" + sized(">H", secrets.token_bytes(32))),
        45: b"\x01\x01",
        41: sized(">H", sized(">H", b"") + bytes(4)) + sized(">H", sized("B", secrets.token_bytes(48))),
    }
    listed = b"".join(struct.pack(">H", number) + sized(">H", octets) for number, octets in extensions.items())
    body = (
        b"\x03\x03" + secrets.token_bytes(32) + b"\x00" + sized(">H", b"\x13\x02") + b"\x01\x00" + sized(">H", listed)
    )
    return b"\x16\x03\x01" + sized(">H", b"\x01" + struct.pack(">I", len(body))[1:] + body)


def test_an_empty_identity_is_refused_in_tls_1_3(api: TlsApi) -> None:
    before = api.refusals()
    with socket.create_connection((LOOPBACK, api.port), timeout=5) as client:
        client.sendall(hello_with_an_empty_identity())
        # A fatal alert (RFC 8446, 6.2): unknown_psk_identity.
        assert client.recv(4096) == b"\x15\x03\x03\x00\x02\x02\x73"
    assert api.refusal(before)["reason"] == "empty PSK identity"


def test_an_identity_of_bytes_that_are_no_text_is_refused(api: TlsApi) -> None:
    before = api.refusals()
    with pytest.raises(Exception, match=r"unknown_psk_identity|Remote|closed"):
        tlslite_psk(api.port, b"\xff\xfe\x00", secrets.token_bytes(32), "sha384", "aes256gcm")
    assert api.refusal(before)["reason"].startswith("unknown PSK identity '\\xff\\xfe")


def test_a_client_without_a_certificate_is_refused_where_certificates_are_asked_for(api: TlsApi) -> None:
    for version in ("-tls1_2", "-tls1_3"):
        _, reason = rejected(api, version)
        assert reason == "no client certificate, and no pre-shared key"


def test_a_certificate_of_a_foreign_authority_is_refused(api: TlsApi, tmp_path: Path) -> None:
    api.kp.run_skipctl("cert", "init", str(tmp_path / "foreign"))
    foreign = ["-cert", f"{tmp_path}/foreign/client.pem", "-key", f"{tmp_path}/foreign/client.key"]
    for version in ("-tls1_2", "-tls1_3"):
        _, reason = rejected(api, version, *foreign)
        assert reason == "bad client certificate: unable to get local issuer certificate"


def test_an_expired_client_certificate_is_refused(api: TlsApi, tmp_path: Path) -> None:
    late = expired_certificate(api, tmp_path)
    for version in ("-tls1_2", "-tls1_3"):
        _, reason = rejected(api, version, *late)
        assert reason == "bad client certificate: certificate has expired"


def test_a_server_certificate_is_no_client_certificate(api: TlsApi) -> None:
    files = ["-cert", str(api.tls.folder / "ecdsa.pem"), "-key", str(api.tls.folder / "ecdsa.key")]
    _, reason = rejected(api, "-tls1_3", *files)
    assert reason.startswith("bad client certificate: ")


def test_a_weak_client_certificate_is_refused(api: TlsApi, tmp_path: Path) -> None:
    ca = ["-CA", str(api.tls.ca_file), "-CAkey", str(api.tls.folder / "ca.key"), "-CAcreateserial"]
    openssl("req", "-newkey", "rsa:1024", "-nodes", "-keyout", "k", "-out", "r", "-subj", "/CN=weak", folder=tmp_path)
    openssl("x509", "-req", "-in", "r", *ca, "-CAserial", "serial", "-out", "c", folder=tmp_path)
    weak = ["-cert", f"{tmp_path}/c", "-key", f"{tmp_path}/k", "-cipher", "DEFAULT@SECLEVEL=0"]
    _, reason = rejected(api, "-tls1_3", *weak)
    assert reason.startswith("bad client certificate: ")


def test_a_client_certificate_of_2048_bits_is_taken_since_routers_have_it(api: TlsApi, tmp_path: Path) -> None:
    ca = ["-CA", str(api.tls.ca_file), "-CAkey", str(api.tls.folder / "ca.key"), "-CAcreateserial"]
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", "k", "-out", "r", "-subj", "/CN=router", folder=tmp_path)
    openssl("x509", "-req", "-in", "r", *ca, "-CAserial", "serial", "-out", "c", folder=tmp_path)
    assert s_client(api.port, "-tls1_2", "-cert", f"{tmp_path}/c", "-key", f"{tmp_path}/k").served


@pytest.mark.parametrize("version", ["-tls1", "-tls1_1"])
def test_older_versions_are_refused(api: TlsApi, version: str) -> None:
    _, reason = rejected(api, version, "-cipher", "ALL@SECLEVEL=0", *api.psk())
    assert reason == "no shared version: only TLS 1.2 and 1.3 are spoken here"


def test_a_client_that_does_not_trust_our_authority_is_told_from_one_that_we_do_not_trust(api: TlsApi) -> None:
    """The commonest fault of all: the router has the wrong authority, or none."""
    before = api.refusals()
    seen = curl(api.port, "--cert", str(api.tls.client_cert_file), "--key", str(api.tls.client_key_file))
    assert not seen.served
    assert api.refusal(before)["reason"] == "the client refused, with the alert unknown ca"


@pytest.mark.parametrize("digest", ["SHA1", "SHA224"])
def test_a_client_that_takes_weak_signatures_only_is_refused(api: TlsApi, digest: str) -> None:
    wish = ["-sigalgs", f"RSA+{digest}:ECDSA+{digest}", "-cipher", "ECDHE-RSA-AES256-GCM-SHA384@SECLEVEL=0"]
    _, reason = rejected(api, "-tls1_2", *wish, *api.certificate())
    assert reason in ("no shared signature algorithm", "no shared cipher suite")


@pytest.mark.parametrize(("version", "group"), [("-tls1_2", "secp224r1"), ("-tls1_3", "ffdhe2048")])
def test_a_client_with_groups_below_128_bits_only_is_refused(api: TlsApi, version: str, group: str) -> None:
    wish = ["-groups", group, "-cipher", "ECDHE-RSA-AES256-GCM-SHA384@SECLEVEL=0"]
    _, reason = rejected(api, version, *wish, *api.certificate())
    assert reason in ("no shared key exchange group", "no shared cipher suite")


def test_plain_http_on_the_tls_port_is_told_so(api: TlsApi) -> None:
    before = api.refusals()
    with socket.create_connection((LOOPBACK, api.port), timeout=5) as plain:
        plain.sendall(b"GET /capabilities HTTP/1.1\r\nHost: kp\r\n\r\n")
        answer = plain.recv(4096)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"HTTPS" in answer
    assert api.refusal(before)["reason"] == "plain HTTP on the TLS port"


def test_what_is_not_tls_at_all_is_refused(api: TlsApi) -> None:
    before = api.refusals()
    with socket.create_connection((LOOPBACK, api.port), timeout=5) as noise:
        noise.sendall(secrets.token_bytes(3) + b"\x00" * 500)
        noise.settimeout(5)
        while noise.recv(4096):
            pass
    assert api.refusal(before)["reason"]


def test_a_record_that_is_too_long_is_refused_in_the_same_words_by_every_openssl(api: TlsApi) -> None:
    before = api.refusals()
    with socket.create_connection((LOOPBACK, api.port), timeout=10) as client:
        client.sendall(b"\x16\x03\x01\xff\xff" + bytes(100))
        client.recv(100)
    assert api.refusal(before)["reason"] == "a record is damaged or too long"


def test_a_handshake_that_stops_half_way_is_ended_in_time(api: TlsApi) -> None:
    context = ssl.create_default_context(cafile=str(api.tls.ca_file))
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    for sent in (b"", hello[:50], hello):
        before, started = api.refusals(), time.monotonic()
        with socket.create_connection((LOOPBACK, api.port), timeout=10) as half:
            half.sendall(sent)
            half.settimeout(10)
            while half.recv(65536):
                pass
        assert time.monotonic() - started < HANDSHAKE_TIMEOUT_SECONDS + 2
        assert api.refusal(before)["reason"] == "timeout: the handshake did not end within 1 s"


def test_a_client_that_goes_away_in_the_handshake_leaves_a_line(api: TlsApi) -> None:
    before = api.refusals()
    socket.create_connection((LOOPBACK, api.port), timeout=5).close()
    assert api.refusal(before)["reason"] == "the client ended the connection during the handshake"


def test_a_request_that_is_never_finished_is_ended_under_tls_too(api: TlsApi) -> None:
    context = ssl.create_default_context(cafile=str(api.tls.ca_file))
    context.load_cert_chain(api.tls.client_cert_file, api.tls.client_key_file)
    with (
        socket.create_connection((LOOPBACK, api.port), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as tls,
    ):
        tls.sendall(b"GET /capabilities HT")
        started = time.monotonic()
        assert tls.recv(100) == b""
        assert time.monotonic() - started < 5


def test_one_address_cannot_have_more_connections_than_its_share(api: TlsApi) -> None:
    crowd = [socket.create_connection((LOOPBACK, api.port), timeout=5) for _ in range(MAX_PER_ADDRESS + 5)]
    try:
        wait_for(lambda: bool(api.lines("handshake refused", limit=MAX_PER_ADDRESS)), timeout_seconds=5)
        (line,) = api.lines("handshake refused", limit=MAX_PER_ADDRESS)
        assert line["reason"] == "too many connections from this address"
    finally:
        for one in crowd:
            one.close()
    wait_for(lambda: s_client(api.port, *api.psk()).served, timeout_seconds=5)


def test_connections_that_have_ended_give_their_place_back(api: TlsApi) -> None:
    for _ in range(MAX_PER_ADDRESS + 2):
        assert s_client(api.port, *api.psk()).served


def test_the_end_of_a_certificate_is_announced_in_the_log_and_in_health(tmp_path: Path) -> None:
    api = TlsApi(tmp_path)
    api.prepare()
    for name in ("ca.pem", "ca.key", "rsa.pem", "rsa.key", "ecdsa.pem", "ecdsa.key", "client.pem", "client.key"):
        (api.tls.folder / name).unlink()
    api.kp.run_skipctl("cert", "init", str(api.tls.folder), "--days", "5")
    with api:
        ends = (datetime.now(UTC) + timedelta(days=5)).strftime("%Y-%m-%d")
        warnings = api.warnings()
        assert [sum(name in text for text in warnings) for name in ("/rsa.pem", "/ecdsa.pem", "/ca.pem")] == [1, 1, 1]
        # With the authority of the clients every one of them would be locked out.
        assert any("ca.pem (CN=skipbus lab)" in text for text in warnings)
        assert all("expires in 4 days" in text and ends in text for text in warnings)
        assert [line["reason"] for line in api.lines("certificate ends")] == warnings
