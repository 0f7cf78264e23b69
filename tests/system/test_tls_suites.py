"""Every row of the draft's Table 1, and what routers offer besides, by clients that nobody here wrote."""

from __future__ import annotations

import re
import ssl
import subprocess
from collections.abc import Iterator

import pytest

from tests.system.tls_api import TlsApi, curl, renegotiate, s_client, tlslite_psk
from tests.waiting import wait_for

PSK_SUITES = [
    # The draft's Table 1.
    "DHE-PSK-AES256-CBC-SHA384",
    "DHE-PSK-AES256-CBC-SHA",
    # IOS XE.
    "PSK-AES256-GCM-SHA384",
    "DHE-PSK-AES256-GCM-SHA384",
    "PSK-AES256-CBC-SHA384",
]
MORE_PSK_SUITES = ["ECDHE-PSK-AES256-CBC-SHA384", "ECDHE-PSK-CHACHA20-POLY1305"]
CERTIFICATE_SUITES = [
    "AES256-SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-CHACHA20-POLY1305",
]
WEAK_SUITES = [
    "AES128-SHA",
    "AES256-SHA",
    "AES128-GCM-SHA256",
    "ECDHE-RSA-AES256-SHA",
    "ECDHE-ECDSA-AES128-SHA256",
    "PSK-AES256-CBC-SHA",
    "PSK-AES128-CBC-SHA256",
    "ECDHE-PSK-AES256-CBC-SHA",
    "RSA-PSK-AES256-GCM-SHA384",
    "PSK-NULL-SHA384",
    "DHE-PSK-AES128-GCM-SHA256",
]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsApi]:
    """Pre-shared keys and client certificates on one port."""
    with TlsApi(tmp_path_factory.mktemp("tls")) as made:
        yield made


@pytest.fixture(scope="module")
def psk_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsApi]:
    """Pre-shared keys and no certificate at all."""
    no_certificates = dict.fromkeys(("SKIP_TLS_CERT_FILE", "SKIP_TLS_KEY_FILE", "SKIP_TLS_CLIENT_CA_FILE"), "")
    with TlsApi(tmp_path_factory.mktemp("psk"), no_certificates) as made:
        yield made


@pytest.mark.parametrize("suite", PSK_SUITES + MORE_PSK_SUITES)
def test_tls_1_2_with_a_psk_is_served_and_its_identity_stands_in_the_access_log(api: TlsApi, suite: str) -> None:
    before = len(api.lines("request", proof="psk"))
    seen = s_client(api.port, "-tls1_2", "-cipher", suite, *api.psk())
    assert (seen.served, seen.cipher) == (True, suite), seen.output
    line = api.one_more(before, "request", proof="psk")
    assert line["identity"] == api.tls.psk_identity


@pytest.mark.parametrize("suite", PSK_SUITES)
def test_tls_1_2_with_a_psk_needs_no_certificate_at_the_server(psk_only: TlsApi, suite: str) -> None:
    seen = s_client(psk_only.port, "-tls1_2", "-cipher", suite, *psk_only.psk())
    assert (seen.served, seen.cipher) == (True, suite), seen.output


@pytest.mark.parametrize("suite", CERTIFICATE_SUITES)
def test_tls_1_2_with_a_client_certificate_is_served_and_its_names_stand_in_the_access_log(
    api: TlsApi, suite: str
) -> None:
    before = len(api.lines("request", proof="certificate"))
    seen = s_client(api.port, "-tls1_2", "-cipher", suite, *api.certificate())
    assert (seen.served, seen.cipher) == (True, suite), seen.output
    line = api.one_more(before, "request", proof="certificate")
    assert line["identity"] == "CN=client; DNS:client"


def test_tls_1_3_with_a_client_certificate_takes_the_draft_s_suite(api: TlsApi) -> None:
    seen = s_client(api.port, "-tls1_3", *api.certificate())
    assert (seen.served, seen.cipher) == (True, "TLS_AES_256_GCM_SHA384"), seen.output


@pytest.mark.parametrize("which", ["api", "psk_only"])
def test_tls_1_3_with_a_psk_takes_the_draft_s_suite(which: str, request: pytest.FixtureRequest) -> None:
    api: TlsApi = request.getfixturevalue(which)
    before = len(api.lines("request", proof="psk"))
    key = bytes.fromhex(api.tls.psk_hex)
    answer, cipher = tlslite_psk(api.port, api.tls.psk_identity.encode(), key, "sha384", "aes256gcm")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert cipher == "aes256gcm"
    line = api.one_more(before, "request", proof="psk")
    assert line["identity"] == api.tls.psk_identity


@pytest.mark.parametrize("cipher", ["chacha20-poly1305", "aes128gcm"])
def test_tls_1_3_with_a_psk_for_sha_256_is_served_too(api: TlsApi, cipher: str) -> None:
    key = bytes.fromhex(api.tls.psk_hex)
    answer, _ = tlslite_psk(api.port, api.tls.psk_identity.encode(), key, "sha256", cipher)
    assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("which", ["api", "psk_only"])
def test_s_client_with_a_psk_and_no_other_wish_is_served(which: str, request: pytest.FixtureRequest) -> None:
    """Its keys are for SHA-256 in TLS 1.3: the earlier server's README has this line."""
    api: TlsApi = request.getfixturevalue(which)
    seen = s_client(api.port, *api.psk())
    assert seen.served, seen.output
    wait_for(lambda: api.lines("request")[-1].get("identity") == api.tls.psk_identity, timeout_seconds=5)


def test_curl_with_a_client_certificate_is_served(api: TlsApi) -> None:
    tls = api.tls
    seen = curl(
        api.port,
        *("--cacert", str(tls.ca_file), "--cert", str(tls.client_cert_file), "--key", str(tls.client_key_file)),
    )
    assert (seen.served, seen.cipher) == (True, "TLS_AES_256_GCM_SHA384"), seen.output


def test_curl_keeps_one_connection_for_several_requests(api: TlsApi) -> None:
    tls = api.tls
    credentials = ("--cacert", str(tls.ca_file), "--cert", str(tls.client_cert_file), "--key", str(tls.client_key_file))
    seen = curl(api.port, *credentials, f"https://127.0.0.1:{api.port}/capabilities")
    assert seen.output.count("SSL connection using") == 1
    assert seen.output.count("HTTP/1.1 200 OK") == 2


@pytest.mark.parametrize("suite", WEAK_SUITES)
def test_a_suite_that_is_not_listed_is_refused_with_what_was_offered(api: TlsApi, suite: str) -> None:
    before = api.refusals()
    wish = f"{suite}@SECLEVEL=0"
    seen = s_client(api.port, "-tls1_2", "-cipher", wish, *(api.psk() if "PSK" in suite else api.certificate()))
    assert not seen.served
    line = api.refusal(before)
    assert line["reason"] == "no shared cipher suite"
    assert len(line["offered"]) == 1
    assert line["offered"][0].startswith("TLS_")


def test_neither_sessions_nor_tickets_are_given_out(api: TlsApi) -> None:
    for wish in (["-tls1_2", "-cipher", "PSK", *api.psk()], ["-tls1_2", *api.certificate()]):
        output = s_client(api.port, *wish).output
        assert "TLS session ticket:" not in output
        assert "Session-ID: \n" in output
    assert "Post-Handshake New Session Ticket" not in s_client(api.port, "-tls1_3", *api.certificate()).output


@pytest.mark.parametrize("proof", ["certificate", "psk"])
def test_a_client_cannot_renegotiate(api: TlsApi, proof: str) -> None:
    credentials = api.certificate() if proof == "certificate" else ["-cipher", "PSK", *api.psk()]
    output = renegotiate(api.port, "-tls1_2", *credentials)
    assert "no renegotiation" in output.lower()


def test_the_hybrid_group_is_taken_where_openssl_has_it_and_x25519_elsewhere(api: TlsApi) -> None:
    """The server's OpenSSL is this interpreter's; the client's is the program's."""
    output = s_client(api.port, "-tls1_3", *api.certificate()).output
    program = subprocess.run(["openssl", "version"], capture_output=True, text=True, check=True).stdout
    both = min(ssl.OPENSSL_VERSION_INFO[:2], tuple(map(int, program.split()[1].split(".")[:2])))
    assert ("X25519MLKEM768" if both >= (3, 5) else "Server Temp Key: X25519,") in output


def test_compression_is_off(api: TlsApi) -> None:
    assert "Compression: NONE" in s_client(api.port, "-tls1_2", "-comp", *api.certificate()).output


def test_the_ec_and_the_rsa_certificate_are_both_shown(api: TlsApi) -> None:
    for kind, wish in (("ECDSA", "ecdsa_secp384r1_sha384"), ("RSA-PSS", "rsa_pss_rsae_sha384")):
        output = s_client(api.port, "-tls1_3", "-sigalgs", wish, *api.certificate()).output
        shown = re.search(r"^Peer signature type: (\S+)", output, re.MULTILINE)
        # OpenSSL 3.5 tells the algorithm, and older releases its kind.
        assert shown is not None, output
        assert shown[1] in (kind, wish), output
