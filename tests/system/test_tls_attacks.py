"""What somebody without a key can do to the TLS port, and what the clients with one notice of it."""

from __future__ import annotations

import _ssl
import contextlib
import ctypes
import secrets
import signal
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.handshakes import with_psk
from bench.machine import resident_mib
from sandbox.ports import LOOPBACK
from tests.system.harness import in_background
from tests.system.tls_api import REQUEST, TlsApi, s_client, tlslite_psk
from tests.waiting import wait_for

HANDSHAKE_TIMEOUT_SECONDS = 3.0
MAX_CONNECTIONS = 40
HALF_OPEN = 300


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsApi]:
    """One that has room for few connections."""
    narrow = {
        "SKIP_TLS_HANDSHAKE_TIMEOUT_SECONDS": str(HANDSHAKE_TIMEOUT_SECONDS),
        "SKIP_MAX_CONNECTIONS": str(MAX_CONNECTIONS),
    }
    with TlsApi(tmp_path_factory.mktemp("tls"), narrow) as made:
        yield made


def client_context(api: TlsApi) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(api.tls.ca_file))
    context.load_cert_chain(api.tls.client_cert_file, api.tls.client_key_file)
    return context


def client_hello(api: TlsApi) -> bytes:
    outgoing = ssl.MemoryBIO()
    client = client_context(api).wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def open_sockets(pid: int) -> int:
    """How many sockets a process has open."""
    count = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            count += str(entry.readlink()).startswith("socket:")
    return count


def test_half_open_handshakes_crowd_out_one_another_and_nobody_else(api: TlsApi) -> None:
    pid, before = api.kp.processes["api"].pid, open_sockets(api.kp.processes["api"].pid)
    with contextlib.ExitStack() as at_end:
        raw = at_end.enter_context(socket.create_connection((LOOPBACK, api.port), timeout=10))
        kept = at_end.enter_context(client_context(api).wrap_socket(raw, server_hostname="localhost"))
        kept.sendall(REQUEST.replace("Connection: close\r\n", "").encode())
        assert kept.recv(4096).startswith(b"HTTP/1.1 200 ")
        for _ in range(HALF_OPEN):
            at_end.enter_context(socket.create_connection((LOOPBACK, api.port), timeout=10))
        # All of them are still open at their end, and none has run into its timeout.
        assert s_client(api.port, *api.psk()).served
        assert open_sockets(pid) <= before + MAX_CONNECTIONS + 2
        kept.sendall(REQUEST.encode())
        assert kept.recv(4096).startswith(b"HTTP/1.1 200 ")
    crowded = [line for line in api.lines("handshake refused") if line["reason"].startswith("crowded out")]
    assert len(crowded) >= HALF_OPEN - MAX_CONNECTIONS
    wait_for(lambda: open_sockets(pid) <= before + 1, timeout_seconds=HANDSHAKE_TIMEOUT_SECONDS + 3)


def test_a_handshake_that_comes_byte_by_byte_is_ended_in_time(api: TlsApi) -> None:
    before, started = timeouts(api), time.monotonic()
    with socket.create_connection((LOOPBACK, api.port), timeout=10) as slow, contextlib.suppress(ConnectionError):
        for byte in client_hello(api):
            slow.sendall(bytes([byte]))
            time.sleep(0.05)
            assert time.monotonic() - started < HANDSHAKE_TIMEOUT_SECONDS + 2
    wait_for(lambda: timeouts(api) > before, timeout_seconds=10)
    assert timeouts(api) == before + 1


def timeouts(api: TlsApi) -> int:
    """Handshakes refused for that; the half-open ones of an earlier test may still be refused for other reasons."""
    return len([line for line in api.lines("handshake refused") if line["reason"].startswith("timeout: ")])


def test_a_client_hello_of_sixteen_mebibytes_is_refused_at_its_beginning(api: TlsApi) -> None:
    before, sent = api.refusals(), 0
    # The handshake message says that 16 MiB follow, in records of 16 KiB.
    hello = b"\x01\xff\xff\xff\x03\x03" + secrets.token_bytes(16_384 - 6)
    with socket.create_connection((LOOPBACK, api.port), timeout=10) as huge, contextlib.suppress(ConnectionError):
        while sent < 16 << 20:
            huge.sendall(b"\x16\x03\x01" + struct.pack(">H", len(hello)) + hello)
            sent += len(hello)
    assert sent < 8 << 20
    assert api.refusal(before)["reason"] == "excessive message size"


def test_a_client_that_offers_a_thousand_keys_is_refused(api: TlsApi) -> None:
    before = api.refusals()
    offered = [(b"%d" % number, secrets.token_bytes(32), "sha384") for number in range(1_000)]
    with pytest.raises(Exception, match=r"illegal_parameter|Remote|closed"):
        tlslite_psk(api.port, *offered[0], "aes256gcm", more=offered[1:])
    assert api.refusal(before)["reason"] == "more than 16 pre-shared keys offered at once"


def test_a_client_that_offers_several_keys_is_served_by_the_one_that_is_known(api: TlsApi) -> None:
    known = (api.tls.psk_identity.encode(), bytes.fromhex(api.tls.psk_hex), "sha384")
    others = [(b"other-%d" % number, secrets.token_bytes(32), "sha384") for number in range(3)]
    answer, _ = tlslite_psk(api.port, *others[0], "aes256gcm", more=[*others[1:], known])
    assert answer.startswith(b"HTTP/1.1 200 ")
    wait_for(lambda: bool(api.lines("request", proof="psk")), timeout_seconds=3)
    assert api.lines("request", proof="psk")[-1]["identity"] == api.tls.psk_identity


def test_the_files_are_exchanged_while_handshakes_run_and_none_of_them_fails(api: TlsApi) -> None:
    before, again = api.refusals(), len(api.lines("tls files read again"))
    shaker = with_psk(api.port, api.tls.psk_identity, api.tls.psk_hex, "DHE-PSK-AES256-GCM-SHA384")

    def shake(stop: threading.Event) -> None:
        while not stop.is_set():
            shaker.run(40)

    with in_background(shake):
        for number in range(4):
            api.kp.run_skipctl("psk", "add", f"router-{number}")
            api.kp.processes["api"].send(signal.SIGHUP)
            wait_for(lambda: len(api.lines("tls files read again")) > again + number, timeout_seconds=5)  # noqa: B023
    assert api.refusals() == before


KEY_UPDATES = 1_000_000
FEW_UPDATES = 30
# As many as the event loop takes from the kernel at once.
BURST = 9_700
TOO_MANY_UPDATES = "new keys, or other things that are no data, without end"
UPDATE_REQUESTED = 1


class KeyUpdater:
    """A client in TLS 1.3 that asks for new keys, and again, and reads nothing."""

    def __init__(self, api: TlsApi) -> None:
        self.socket = socket.socket()
        # The kernels would take megabytes of answers that nobody reads: small segments make their buffers small.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        self.socket.settimeout(10)
        self.socket.connect((LOOPBACK, api.port))
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._client = client_context(api).wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        while self._goes_on():
            self._incoming.write(self.socket.recv(65_536))
        self._library = ctypes.CDLL(_ssl.__file__)
        # `struct { PyObject_HEAD; PyObject *Socket; SSL *ssl; ... }` in every release from 3.11 to 3.13.
        self._pointer = ctypes.c_void_p.from_address(id(vars(self._client)["_sslobj"]) + object.__basicsize__ + 8)

    def _goes_on(self) -> bool:
        try:
            self._client.do_handshake()
            return False
        except ssl.SSLWantReadError:
            return True
        finally:
            self.socket.sendall(self._outgoing.read())

    def ask(self, times: int) -> None:
        """Sends so many requests. Raises OSError once the server has ended the connection."""
        for _ in range(times):
            assert self._library.SSL_key_update(self._pointer, UPDATE_REQUESTED) == 1
            assert self._library.SSL_do_handshake(self._pointer) == 1
        self.socket.sendall(self._outgoing.read())

    def request(self) -> None:
        """One request, and its answer."""
        self._client.write(REQUEST.replace("Connection: close\r\n", "").encode())
        self.socket.sendall(self._outgoing.read())
        answer = b""
        while not answer:
            self._incoming.write(self.socket.recv(65_536))
            with contextlib.suppress(ssl.SSLWantReadError):
                answer = self._client.read(4096)
        assert answer.startswith(b"HTTP/1.1 200 ")


def test_a_client_that_asks_for_new_keys_without_end_and_reads_nothing_is_ended(api: TlsApi) -> None:
    pid = api.kp.processes["api"].pid
    before = resident_mib(pid)
    updater, asked = KeyUpdater(api), 0
    with updater.socket, contextlib.suppress(ConnectionError):
        while asked < KEY_UPDATES:
            updater.ask(FEW_UPDATES)
            asked += FEW_UPDATES
            # A few at a time pass for what a client may do, as long as the server is as quick as that.
            time.sleep(0.01)
    assert asked < KEY_UPDATES
    # A thread writes the log, a moment later.
    wait_for(lambda: bool(api.lines("connection ended")), timeout_seconds=10)
    line = api.lines("connection ended")[-1]
    assert line["reason"] in ("what it asks for in TLS is not taken", TOO_MANY_UPDATES)
    assert resident_mib(pid) < before + 32
    assert s_client(api.port, *api.psk()).served


def test_a_burst_of_new_keys_ends_its_connection_before_it_keeps_others_waiting(api: TlsApi) -> None:
    before = len(api.lines("connection ended", reason=TOO_MANY_UPDATES))
    updater = KeyUpdater(api)
    with updater.socket, contextlib.suppress(ConnectionError):
        updater.ask(BURST)
        while updater.socket.recv(65_536):
            pass
    line = api.one_more(before, "connection ended", reason=TOO_MANY_UPDATES)
    assert (line["client"], line["identity"]) == (LOOPBACK, "CN=client; DNS:client")
    assert s_client(api.port, *api.psk()).served


def test_a_client_that_takes_new_keys_before_every_request_is_served(api: TlsApi) -> None:
    updater = KeyUpdater(api)
    with updater.socket:
        for _ in range(200):
            updater.ask(1)
            updater.request()
