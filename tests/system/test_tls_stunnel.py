"""Real stunnel before the plain port, as `compose/stunnel` configures it: the same clients, and its limits."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.ports import LOOPBACK
from sandbox.stunnel import Stunnel
from tests.system.test_tls_suites import PSK_SUITES, WEAK_SUITES
from tests.system.tls_api import TlsApi, curl, expired_certificate, renegotiate, s_client, tlslite_psk


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsApi]:
    """The api whose plain port is behind it."""
    with TlsApi(tmp_path_factory.mktemp("tls")) as made:
        yield made


@pytest.fixture(scope="module", params=["rsa", "ecdsa"])
def stunnel(
    api: TlsApi, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[Stunnel, str]]:
    """One for each of the two certificates: it can show one only."""
    with Stunnel(api.kp, tmp_path_factory.mktemp("stunnel"), server=request.param) as made:
        yield made, request.param


@pytest.mark.parametrize("suite", PSK_SUITES)
def test_tls_1_2_with_a_psk_is_served(api: TlsApi, stunnel: tuple[Stunnel, str], suite: str) -> None:
    seen = s_client(stunnel[0].port, "-tls1_2", "-cipher", suite, *api.psk())
    assert (seen.served, seen.cipher) == (True, suite), seen.output


def test_tls_1_2_with_a_certificate_is_served(api: TlsApi, stunnel: tuple[Stunnel, str]) -> None:
    for suite in {
        "rsa": ["AES256-SHA256", "ECDHE-RSA-AES256-GCM-SHA384"],
        "ecdsa": ["ECDHE-ECDSA-AES256-GCM-SHA384"],
    }[stunnel[1]]:
        seen = s_client(stunnel[0].port, "-tls1_2", "-cipher", suite, *api.certificate())
        assert (seen.served, seen.cipher) == (True, suite), seen.output


def test_tls_1_3_with_a_certificate_takes_the_draft_s_suite(api: TlsApi, stunnel: tuple[Stunnel, str]) -> None:
    seen = s_client(stunnel[0].port, "-tls1_3", *api.certificate())
    assert (seen.served, seen.cipher) == (True, "TLS_AES_256_GCM_SHA384"), seen.output
    files = ("--cert", str(api.tls.client_cert_file), "--key", str(api.tls.client_key_file))
    assert curl(stunnel[0].port, "--cacert", str(api.tls.ca_file), *files).served


def test_tls_1_3_with_a_psk_is_its_limit(api: TlsApi, stunnel: tuple[Stunnel, str]) -> None:
    """OpenSSL's older callback, which stunnel uses, gives keys for SHA-256 only; the draft's suite has SHA-384."""
    identity, key = api.tls.psk_identity.encode(), bytes.fromhex(api.tls.psk_hex)
    for cipher in ("aes128gcm", "chacha20-poly1305"):
        assert tlslite_psk(stunnel[0].port, identity, key, "sha256", cipher)[0].startswith(b"HTTP/1.1 200 ")
    with pytest.raises(Exception, match=r"."):
        tlslite_psk(stunnel[0].port, identity, key, "sha384", "aes256gcm")


def test_whoever_shows_nothing_or_a_wrong_key_is_refused(api: TlsApi, stunnel: tuple[Stunnel, str]) -> None:
    assert not s_client(stunnel[0].port, "-tls1_3").served
    assert not s_client(stunnel[0].port, "-tls1_2", "-cipher", "PSK", *api.psk(key_hex="ab" * 32)).served
    assert not s_client(stunnel[0].port, "-tls1_2", "-cipher", "PSK", *api.psk(identity="nobody")).served


@pytest.mark.parametrize("suite", WEAK_SUITES)
def test_a_weak_suite_is_refused(api: TlsApi, stunnel: tuple[Stunnel, str], suite: str) -> None:
    credentials = api.psk() if "PSK" in suite else api.certificate()
    assert not s_client(stunnel[0].port, "-tls1_2", "-cipher", f"{suite}@SECLEVEL=0", *credentials).served


@pytest.mark.parametrize("version", ["-tls1", "-tls1_1"])
def test_an_older_version_is_refused(api: TlsApi, stunnel: tuple[Stunnel, str], version: str) -> None:
    assert not s_client(stunnel[0].port, version, "-cipher", "ALL@SECLEVEL=0", *api.psk()).served


def test_a_client_cannot_renegotiate(api: TlsApi, stunnel: tuple[Stunnel, str]) -> None:
    assert "no renegotiation" in renegotiate(stunnel[0].port, "-tls1_2", *api.certificate()).lower()


def test_a_handshake_that_stops_half_way_is_ended_in_time(stunnel: tuple[Stunnel, str]) -> None:
    started = time.monotonic()
    # It ends the connection, politely or not.
    with (
        socket.create_connection((LOOPBACK, stunnel[0].port), timeout=10) as half,
        contextlib.suppress(ConnectionResetError),
    ):
        assert half.recv(1) == b""
    assert time.monotonic() - started < 5


def test_foreign_and_expired_certificates_are_refused(
    api: TlsApi, stunnel: tuple[Stunnel, str], tmp_path: Path
) -> None:
    api.kp.run_skipctl("cert", "init", str(tmp_path / "foreign"))
    foreign = ("-cert", f"{tmp_path}/foreign/client.pem", "-key", f"{tmp_path}/foreign/client.key")
    for version in ("-tls1_2", "-tls1_3"):
        assert not s_client(stunnel[0].port, version, *foreign).served
        assert not s_client(stunnel[0].port, version, *expired_certificate(api, tmp_path)).served


def test_the_api_does_not_know_who_came_through_it(api: TlsApi, stunnel: tuple[Stunnel, str]) -> None:
    before = len(api.lines("request"))
    assert s_client(stunnel[0].port, "-tls1_2", "-cipher", "PSK", *api.psk()).served
    assert "identity" not in api.one_more(before, "request")
