"""The hybrid group of TLS 1.3, with a client that offers it: run by ``test_tls.py`` in a container with OpenSSL 3.5.

The name keeps it out of other runs: an older OpenSSL does not know the group, and nothing is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.system.tls_api import TlsApi, s_client

HYBRID = "X25519MLKEM768"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsApi]:
    """Pre-shared keys and client certificates on one port."""
    with TlsApi(tmp_path_factory.mktemp("tls")) as made:
        yield made


def negotiated(output: str) -> str:
    """The group, as s_client tells it."""
    found = re.search(r"Negotiated TLS1\.3 group: (\S+)", output)
    return found[1] if found else ""


def client_hellos(output: str) -> int:
    """How often the client began, by ``-msg``: twice where it was asked to begin again."""
    return len(re.findall(r"^>>> TLS 1\.3, Handshake \[length [0-9a-f]+\], ClientHello", output, re.MULTILINE))


@pytest.mark.parametrize("proof", ["certificate", "psk"])
def test_a_client_that_offers_only_the_hybrid_group_is_served_with_it(api: TlsApi, proof: str) -> None:
    credentials = api.psk() if proof == "psk" else api.certificate()
    seen = s_client(api.port, "-tls1_3", "-msg", "-groups", HYBRID, *credentials)
    assert seen.served, seen.output
    assert (negotiated(seen.output), client_hellos(seen.output)) == (HYBRID, 1), seen.output


@pytest.mark.parametrize("proof", ["certificate", "psk"])
def test_a_client_that_began_with_another_group_is_asked_to_begin_again_with_the_hybrid_one(
    api: TlsApi, proof: str
) -> None:
    """A HelloRetryRequest (RFC 8446, 4.1.4): the client sends a share for the first group of its list only."""
    credentials = api.psk() if proof == "psk" else api.certificate()
    seen = s_client(api.port, "-tls1_3", "-msg", "-groups", f"X25519:{HYBRID}", *credentials)
    assert seen.served, seen.output
    assert (negotiated(seen.output), client_hellos(seen.output)) == (HYBRID, 2), seen.output


def test_a_client_without_the_hybrid_group_is_served_at_once_with_x25519(api: TlsApi) -> None:
    seen = s_client(api.port, "-tls1_3", "-msg", "-groups", "X25519:secp384r1", *api.certificate())
    assert seen.served, seen.output
    assert client_hellos(seen.output) == 1, seen.output
    assert "Peer Temp Key: X25519, 253 bits" in seen.output, seen.output


def test_pre_shared_keys_are_served_in_full_on_this_interpreter(api: TlsApi) -> None:
    """The self-check has found Python and OpenSSL as it expects them: nothing was switched off."""
    assert api.lines("psk not in full") == []
    assert not [warning for warning in api.warnings() if "pre-shared" in warning]
