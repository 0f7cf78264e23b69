"""The testkit: a pair is up soon, its faults do what they say and heal, and nothing is left of it."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from testcontainers.core.labels import LABEL_SESSION_ID, SESSION_ID

from skipbus_testkit import SkipPair, conformance
from tests.containers.engine import docker
from tests.containers.stack import REPOSITORY
from tests.system.tls_api import s_client
from tests.waiting import wait_for

# The libraries of the engine's client leave sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def module_pair(image: str) -> Iterator[SkipPair]:
    with SkipPair(image=image) as pair:
        yield pair


@pytest.fixture
def pair(module_pair: SkipPair) -> SkipPair:
    module_pair.heal()
    return module_pair


@pytest.mark.timed
@pytest.mark.parametrize("database", ["mysql:9.7", "mariadb:11.8"])
def test_a_pair_is_up_within_30_seconds_and_nothing_is_left_of_it(image: str, database: str) -> None:
    before = _everything()
    begun = time.monotonic()
    with SkipPair(image=image, database=database) as pair:
        up_seconds = time.monotonic() - begun
        pair.exchange()
        folder = pair.alice.ca_file.parent.parent
    assert _everything() == before
    assert not folder.exists()
    assert up_seconds < 30


def test_keys_of_each_size_go_both_ways(pair: SkipPair) -> None:
    for size_bits in (128, 256, 512):
        for source in ("alice", "bob"):
            assert len(pair.exchange(size_bits, source=source).key) == size_bits // 4


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_an_encryptor_gets_in_with_the_pre_shared_key(pair: SkipPair, version: str) -> None:
    port = int(pair.alice.https_url.rpartition(":")[2])
    seen = s_client(port, version, "-psk_identity", pair.alice.psk_identity, "-psk", pair.alice.psk_hex)
    assert seen.body is not None
    assert seen.body["localSystemID"] == "KP_Alice"
    assert [(request.caller, request.proof) for request in pair.alice.requests] == [("router-at-alice", "psk")]


def test_an_encryptor_in_a_container_gets_in_by_the_pairs_network(pair: SkipPair, image: str) -> None:
    script = "import socket; socket.create_connection(('alice', 8443), 5); print('reached')"
    command = ("run", "--rm", f"--network={pair.network_name}", image, "python", "-c", script)
    assert docker(*command).strip() == "reached"
    assert pair.alice.internal_url == "https://alice:8443"


def test_the_next_request_fails_and_the_one_after_does_not(pair: SkipPair) -> None:
    pair.alice.fail_next("/key", 500)
    assert pair.alice.get("capabilities").status == 200
    assert pair.alice.get("key", remoteSystemID="KP_Bob").status == 500
    assert pair.alice.get("key", remoteSystemID="KP_Bob").status == 200


def test_a_failed_retrieval_leaves_the_key_where_it_is(pair: SkipPair) -> None:
    issued = pair.alice.get("key", remoteSystemID="KP_Bob").body
    pair.bob.fail_next("/key/", 503)
    assert pair.bob.get("key", issued["keyId"], remoteSystemID="KP_Alice").status == 503
    assert pair.bob.get("key", issued["keyId"], remoteSystemID="KP_Alice").body == issued


@pytest.mark.timed
def test_a_slow_key_provider_answers_later(pair: SkipPair) -> None:
    pair.bob.slow(600)
    assert _seconds_of(lambda: pair.bob.get("capabilities")) >= 0.6
    pair.bob.slow(0)
    assert _seconds_of(lambda: pair.bob.get("capabilities")) < 0.6


def test_a_paused_key_provider_does_not_answer_and_goes_on_after(pair: SkipPair) -> None:
    issued = pair.alice.get("key", remoteSystemID="KP_Bob").body
    pair.bob.pause()
    with pytest.raises(OSError, match="timed out"):
        _shake_hands(pair.bob.https_url)
    pair.bob.resume()
    assert pair.bob.get("key", issued["keyId"], remoteSystemID="KP_Alice").body == issued


def test_expired_keys_are_refused_and_new_ones_are_not(pair: SkipPair) -> None:
    issued = pair.alice.get("key", remoteSystemID="KP_Bob").body
    pair.expire_all()
    assert pair.bob.get("key", issued["keyId"], remoteSystemID="KP_Alice").status == 400
    pair.exchange()


def test_the_cut_link_takes_the_keys_from_bob_until_it_heals(pair: SkipPair) -> None:
    issued = pair.alice.get("key", remoteSystemID="KP_Bob").body
    # Another one: a retrieval that failed half-way may still have taken its key (at most once).
    asked_for = pair.alice.get("key", remoteSystemID="KP_Bob").body
    pair.cut_link()
    wait_for(lambda: pair.bob.get("health").status == 503, timeout_seconds=20)
    assert pair.bob.get("key", asked_for["keyId"], remoteSystemID="KP_Alice").status == 500
    assert pair.bob.get("capabilities").status == 200
    pair.heal()
    assert pair.bob.get("key", issued["keyId"], remoteSystemID="KP_Alice").body == issued


def test_requests_are_recorded_without_keys(pair: SkipPair) -> None:
    exchanged = pair.exchange()
    (seen,) = pair.alice.requests
    assert (seen.method, seen.path, seen.query, seen.status) == ("GET", "/key", "remoteSystemID=KP_Bob&size=256", 200)
    assert seen.proof == "certificate"
    subject = x509.load_pem_x509_certificate(pair.alice.client_cert_file.read_bytes()).subject.rfc4514_string()
    assert subject.startswith("CN=client,OU=Testing cert #")
    assert seen.caller == f"{subject}; DNS:client"
    assert [request.path for request in pair.bob.requests] == [f"/key/{exchanged.key_id}"]
    shown = (
        f"{pair.alice.requests}{pair.bob.requests}{pair.alice.logs}{pair.bob.logs}{exchanged}{pair.alice.credentials}"
    )
    assert exchanged.key not in shown
    assert pair.alice.psk_hex not in shown


def test_the_pair_conforms_to_the_draft(pair: SkipPair, capsys: pytest.CaptureFixture[str]) -> None:
    parties = (pair.alice, pair.bob)
    files = [
        argument
        for party in parties
        for argument in (f"--ca={party.ca_file}", f"--cert={party.client_cert_file}", f"--key={party.client_key_file}")
    ]
    code = conformance.main([*(party.https_url for party in parties), *files, "--strict"])
    output = capsys.readouterr().out
    assert "FAIL  " not in output
    assert "0 FAIL, 0 warn, 0 skip" in output
    assert code == 0


def test_a_pair_whose_image_is_missing_leaves_nothing(image: str) -> None:
    before = _everything()
    with pytest.raises(Exception, match="no-such-image"), SkipPair(image="skipbus:no-such-image"):
        pass
    assert _everything() == before


def test_the_example_of_the_documentation_runs_and_has_at_most_12_lines(image: str, tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```", (REPOSITORY / "docs" / "testkit.md").read_text(), re.DOTALL)
    assert found is not None
    assert len(found[1].splitlines()) <= 12
    (tmp_path / "test_example.py").write_text(found[1])
    docker("tag", image, "skipbus:latest")
    # The installed plugin is found by itself, as it is for everyone who installed the testkit.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout


def _shake_hands(url: str) -> None:
    """A connection with a handshake, given up after 3 s. Raises OSError."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    address = urlsplit(url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=3) as raw:
        context.wrap_socket(raw)


def _seconds_of(action: object) -> float:
    assert callable(action)
    begun = time.monotonic()
    action()
    return time.monotonic() - begun


def _everything() -> set[str]:
    """What the engine has that testcontainers made in this process: it labels containers and networks."""
    label = f"--filter=label={LABEL_SESSION_ID}={SESSION_ID}"
    return {*docker("ps", "-aq", label).split(), *docker("network", "ls", "-q", label).split()}
