"""Certificates and pre-shared keys while the api runs, who may ask for what, and the plain port beside it."""

from __future__ import annotations

import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.client import get
from sandbox.ports import LOOPBACK
from tests.system.harness import log_lines
from tests.system.tls_api import REQUEST, TlsApi, curl, s_client, tlslite_psk
from tests.waiting import wait_for

NEW_KEY = "ab" * 32


@pytest.fixture
def api(tmp_path: Path) -> Iterator[TlsApi]:
    """A test's own."""
    with TlsApi(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsApi]:
    """One for tests that leave it with files that it has read and can use."""
    with TlsApi(tmp_path_factory.mktemp("shared")) as made:
        yield made


def read_again(api: TlsApi) -> int:
    return len(api.lines("tls files read again"))


def test_a_key_that_is_added_is_served_within_seconds_and_a_connection_goes_on(shared: TlsApi) -> None:
    context = ssl.create_default_context(cafile=str(shared.tls.ca_file))
    context.load_cert_chain(shared.tls.client_cert_file, shared.tls.client_key_file)
    with (
        socket.create_connection((LOOPBACK, shared.port), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as kept,
    ):
        kept.sendall(REQUEST.replace("Connection: close\r\n", "").encode())
        assert kept.recv(4096).startswith(b"HTTP/1.1 200 ")
        output = shared.kp.run_skipctl("psk", "add", "new-router", "--server", "192.0.2.1")
        key = output.rsplit(maxsplit=1)[-1]
        wait_for(lambda: s_client(shared.port, *shared.psk("new-router", key)).served, timeout_seconds=5)
        kept.sendall(REQUEST.encode())
        assert kept.recv(4096).startswith(b"HTTP/1.1 200 ")
    assert key not in shared.kp.log_of("api").read_text()


def test_a_key_that_is_removed_is_refused(shared: TlsApi) -> None:
    arguments = shared.psk()
    assert s_client(shared.port, *arguments).served
    shared.kp.run_skipctl("psk", "remove", shared.tls.psk_identity)
    wait_for(lambda: not s_client(shared.port, *arguments).served, timeout_seconds=5)
    shared.kp.run_skipctl("psk", "add", shared.tls.psk_identity)
    wait_for(lambda: s_client(shared.port, *shared.psk()).served, timeout_seconds=5)


def test_sighup_reads_at_once(shared: TlsApi) -> None:
    before = read_again(shared)
    shared.kp.processes["api"].send(signal.SIGHUP)
    wait_for(lambda: read_again(shared) == before + 1, timeout_seconds=3)
    assert shared.kp.processes["api"].running


def test_a_bad_file_is_reported_and_the_old_keys_stay(api: TlsApi) -> None:
    good = api.tls.psk_file.read_text()
    api.tls.psk_file.write_text(f"{good}short:abcd\n")
    wait_for(lambda: bool(api.lines("tls files refused")), timeout_seconds=5)
    (line,) = api.lines("tls files refused")
    assert line["reason"].startswith(f"{api.tls.psk_file}, line 2: the key has 16 bits; at least 256 are needed")
    assert any("line 2" in text for text in api.warnings())
    assert s_client(
        api.port, "-tls1_2", "-cipher", "PSK", "-psk_identity", api.tls.psk_identity, "-psk", good.split(":")[1].strip()
    ).served
    api.tls.psk_file.write_text(good)
    wait_for(lambda: api.warnings() == [], timeout_seconds=5)
    # It was reported once, not every second.
    assert len(api.lines("tls files refused")) == 1


def looks(api: TlsApi) -> int:
    """How often it has read its files again, with whatever success."""
    return read_again(api) + len(api.lines("tls files refused"))


def kept_connection(api: TlsApi) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(api.tls.ca_file))
    context.load_cert_chain(api.tls.client_cert_file, api.tls.client_key_file)
    raw = socket.create_connection((LOOPBACK, api.port), timeout=10)
    return context.wrap_socket(raw, server_hostname="localhost")


@pytest.mark.parametrize("name", ["psk.txt", "rsa.pem", "rsa.key", "ecdsa.pem", "ca.pem"])
@pytest.mark.parametrize(
    "octets", [b"", b"\xff\x00\xfe", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", None], ids=str
)
def test_no_file_whatever_is_in_it_ends_the_service(shared: TlsApi, name: str, octets: bytes | None) -> None:
    path, looked = shared.tls.folder / name, looks(shared)
    good, mode = path.read_bytes(), path.stat().st_mode
    with kept_connection(shared) as kept:
        try:
            path.unlink()
            if octets is not None:
                path.write_bytes(octets)
                path.chmod(mode)
            shared.kp.processes["api"].send(signal.SIGHUP)
            wait_for(lambda: looks(shared) > looked, timeout_seconds=5)
            # An empty file of keys is one without keys, which somebody may want; all else is refused.
            assert bool(shared.warnings()) == ((name, octets) != ("psk.txt", b""))
            assert s_client(shared.port, "-tls1_3", *shared.certificate()).served
            kept.sendall(REQUEST.encode())
            assert kept.recv(4096).startswith(b"HTTP/1.1 200 ")
        finally:
            path.write_bytes(good)
            path.chmod(mode)
            again = read_again(shared)
            shared.kp.processes["api"].send(signal.SIGHUP)
            wait_for(lambda: read_again(shared) > again, timeout_seconds=5)
    assert shared.warnings() == []
    assert s_client(shared.port, *shared.psk()).served


def test_sighup_to_the_parent_reaches_every_worker(tmp_path: Path) -> None:
    api = TlsApi(tmp_path, {"SKIP_API_WORKERS": "2"})
    with api:
        wait_for(lambda: len(api.lines("listening", tls=True)) == 2, timeout_seconds=20)
        api.kp.run_skipctl("psk", "add", "new-router")
        api.kp.processes["api"].send(signal.SIGHUP)
        wait_for(lambda: len({line["pid"] for line in api.lines("tls files read again")}) == 2, timeout_seconds=5)
        assert all(line["psk_identities"] == 2 for line in api.lines("tls files read again"))


def test_a_renewed_certificate_is_shown_to_new_connections(api: TlsApi, tmp_path: Path) -> None:
    api.kp.run_skipctl("cert", "init", str(tmp_path / "new"), "--name", "renewed lab")
    for name in ("rsa.key", "rsa.pem", "ecdsa.key", "ecdsa.pem"):
        (tmp_path / "new" / name).replace(api.tls.folder / name)
    # OpenSSL 3.5 prints names without spaces.
    renewed = re.compile("CN ?= ?renewed lab")
    wait_for(lambda: renewed.search(s_client(api.port, *api.certificate()).output) is not None, timeout_seconds=6)
    assert s_client(api.port, *api.psk()).served


def test_a_certificate_that_does_not_fit_its_key_is_refused_and_the_old_pair_stays(api: TlsApi, tmp_path: Path) -> None:
    api.kp.run_skipctl("cert", "init", str(tmp_path / "new"))
    (tmp_path / "new" / "ecdsa.pem").replace(api.tls.folder / "ecdsa.pem")
    wait_for(lambda: bool(api.lines("tls files refused")), timeout_seconds=5)
    assert "ecdsa.pem" in api.lines("tls files refused")[0]["reason"]
    assert s_client(api.port, "-tls1_3", *api.certificate()).served


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("r1:abcd\n", "line 1: the key has 16 bits"),
        (f"r1:{NEW_KEY}\nr1:{NEW_KEY}\n", "line 2: the identity 'r1' stands in line 1 already"),
    ],
    ids=["short key", "twice"],
)
def test_a_file_that_cannot_be_used_stops_the_start(tmp_path: Path, text: str, reason: str) -> None:
    api = TlsApi(tmp_path)
    api.prepare()
    api.tls.psk_file.write_text(text)
    assert api.kp.start("api").wait() == 1
    (line,) = api.lines("cannot run")
    assert reason in line["reason"]
    assert NEW_KEY not in line["reason"]


LIMITS = """
[identities]
"router-*" = ["KP_Bob"]
"client" = ["KP_C*"]
"""


def test_a_caller_gets_keys_only_for_the_remote_systems_of_its_identity(tmp_path: Path) -> None:
    config = tmp_path / "limits.toml"
    config.write_text(LIMITS)
    api = TlsApi(tmp_path / "kp", {"SKIP_CONFIG_FILE": str(config), "SKIP_REMOTE_SYSTEM_ID_2": "KP_Carol"})
    api.prepare()
    api.kp.run_skipctl("psk", "add", "stranger")
    stranger = api.tls.psk_file.read_text().split("stranger:")[1].strip()
    tls = api.tls
    certificate = ("--cacert", str(tls.ca_file), "--cert", str(tls.client_cert_file), "--key", str(tls.client_key_file))
    with api:
        # There is no store: 500 means that the caller was let through.
        for remote, status in (("KP_Bob", 500), ("KP_Carol", 400)):
            request = f"GET /key?remoteSystemID={remote} HTTP/1.1\r\nHost: kp\r\nConnection: close\r\n\r\n"
            assert f"HTTP/1.1 {status}" in s_client(api.port, *api.psk(), request=request).output
            assert "HTTP/1.1 400" in s_client(api.port, *api.psk("stranger", stranger), request=request).output
        for remote, status in (("KP_Bob", 400), ("KP_Carol", 500)):
            for path in (f"/key?remoteSystemID={remote}", f"/key/{'ab' * 16}?remoteSystemID={remote}"):
                assert f"HTTP/1.1 {status}" in curl(api.port, *certificate, path=path).output
        # A caller on the plain port of this host is not limited: it has no identity.
        assert get(api.kp.url, "key", remoteSystemID="KP_Carol").status == 500
        wait_for(lambda: len(api.lines("request", status=400)) == 5, timeout_seconds=5)
        refused = api.lines("request", status=400)
        assert {line["identity"] for line in refused} == {tls.psk_identity, "stranger", "CN=client; DNS:client"}
        assert all("may ask for" in line["reason"] for line in refused)


BREAK_THE_WAY_TO_OPENSSL = "import _ssl\n_ssl.__file__ = '/nowhere/_ssl.so'\n"


def test_without_a_way_to_openssl_one_mode_is_off_and_the_rest_is_served(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(BREAK_THE_WAY_TO_OPENSSL)
    api = TlsApi(tmp_path / "kp")
    api.kp.environ["PYTHONPATH"] = f"{broken}:{api.kp.environ['PYTHONPATH']}"
    with api:
        (line,) = api.lines("psk not in full")
        assert api.warnings() == [line["reason"]]
        for version in ("-tls1_2", "-tls1_3"):
            assert s_client(api.port, version, *api.certificate()).served
        key = bytes.fromhex(api.tls.psk_hex)
        with pytest.raises(Exception, match=r"."):
            tlslite_psk(api.port, api.tls.psk_identity.encode(), key, "sha384", "aes256gcm")
        # Before Python 3.13 the standard library has no pre-shared keys at all.
        served = s_client(api.port, "-tls1_2", "-cipher", "PSK-AES256-GCM-SHA384", *api.psk()).served
        assert served == (sys.version_info >= (3, 13))
        said = "TLS 1.3 with pre-shared keys is off" if served else "pre-shared keys are off"
        assert line["reason"].startswith(said)


def own_address() -> str:
    """An address of this machine that is not loopback."""
    found = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
    return next(address for address in found if ":" not in address)


def answers(address: str, port: int) -> bool:
    try:
        return get(f"http://{address}:{port}", "capabilities", timeout_seconds=3).status == 200
    except OSError:
        return False


@pytest.mark.parametrize("allowed", ["", "1"], ids=["refused", "allowed"])
def test_the_plain_port_leaves_this_host_only_when_that_is_allowed(tmp_path: Path, allowed: str) -> None:
    api = TlsApi(tmp_path, {"SKIP_HOST": "0.0.0.0", "SKIP_ALLOW_PLAINTEXT": allowed})  # noqa: S104 -- what is tested
    with api:
        warned = [line["event"] for line in log_lines(api.kp, "api") if line["level"] == "warning"]
        assert answers(LOOPBACK, api.kp.port)
        assert answers(own_address(), api.kp.port) == bool(allowed)
        assert ("keys are served without TLS" if allowed else "plain port on loopback only") in warned
        assert curl(api.port, "-k", *curl_files(api)).served


def curl_files(api: TlsApi) -> tuple[str, ...]:
    return "--cert", str(api.tls.client_cert_file), "--key", str(api.tls.client_key_file)


def test_another_key_provider_cannot_join_the_tls_port_but_a_second_process_can(api: TlsApi, tmp_path: Path) -> None:
    other = TlsApi(tmp_path / "other", {"SKIP_TLS_PORT": str(api.port), "SKIP_LOCAL_SYSTEM_ID": "KP_Carol"})
    other.prepare()
    assert other.kp.start("api").wait() == 1
    assert "SKIP_TLS_PORT" in other.lines("cannot run")[0]["reason"]
    second = TlsApi(tmp_path / "second", {"SKIP_TLS_PORT": str(api.port), "SKIP_PORT": str(api.kp.port)})
    with second:
        pass
