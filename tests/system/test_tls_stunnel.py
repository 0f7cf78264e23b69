"""Real stunnel before the plain port, as `compose/stunnel` configures it: the same clients, and its limits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sandbox.stunnel import Stunnel
from tests.system.test_tls_suites import PSK_SUITES
from tests.system.tls_api import TlsApi, curl, s_client, tlslite_psk


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsApi]:
    """The api whose plain port is behind it."""
    made = TlsApi(tmp_path_factory.mktemp("tls"))
    made.prepare()
    try:
        yield made.start()
    finally:
        made.stop()


@pytest.fixture(scope="module", params=["rsa", "ecdsa"])
def stunnel(
    api: TlsApi, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[Stunnel, str]]:
    """One for each of the two certificates: it can show one only."""
    made = Stunnel(api.kp, tmp_path_factory.mktemp("stunnel"), server=request.param)
    try:
        yield made.start(), request.param
    finally:
        made.stop()


@pytest.mark.parametrize("suite", PSK_SUITES)
def test_tls_1_2_with_a_psk_is_served(api: TlsApi, stunnel: tuple[Stunnel, str], suite: str) -> None:
    seen = s_client(stunnel[0].port, "-tls1_2", "-cipher", suite, *api.psk())
    assert (seen.served, seen.cipher) == (True, suite), seen.output


def test_tls_1_2_with_a_certificate_is_served(api: TlsApi, stunnel: tuple[Stunnel, str]) -> None:
    suite = {"rsa": "AES256-SHA256", "ecdsa": "ECDHE-ECDSA-AES256-GCM-SHA384"}[stunnel[1]]
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
    assert tlslite_psk(stunnel[0].port, identity, key, "sha256", "aes128gcm")[0].startswith(b"HTTP/1.1 200 ")
    with pytest.raises(Exception, match=r"."):
        tlslite_psk(stunnel[0].port, identity, key, "sha384", "aes256gcm")


def test_whoever_shows_nothing_or_a_wrong_key_is_refused(api: TlsApi, stunnel: tuple[Stunnel, str]) -> None:
    assert not s_client(stunnel[0].port, "-tls1_3").served
    assert not s_client(stunnel[0].port, "-tls1_2", "-cipher", "PSK", *api.psk(key_hex="ab" * 32)).served
    assert not s_client(stunnel[0].port, "-tls1_2", "-cipher", "PSK", *api.psk(identity="nobody")).served


def test_the_api_does_not_know_who_came_through_it(api: TlsApi, stunnel: tuple[Stunnel, str]) -> None:
    before = len(api.lines("request"))
    assert s_client(stunnel[0].port, "-tls1_2", "-cipher", "PSK", *api.psk()).served
    assert "identity" not in api.request_line(before)
