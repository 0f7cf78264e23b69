"""The end of an api: who connected before SIGTERM is answered, and learns that the connection ends."""

from __future__ import annotations

import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.ports import LOOPBACK, answers
from skipbus_testkit.client import client_context
from tests.system.harness import RawConnection
from tests.system.tls_api import TlsApi
from tests.waiting import wait_for

REQUEST = b"GET /capabilities HTTP/1.1\r\nHost: kp\r\n\r\n"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[TlsApi]:
    with TlsApi(tmp_path) as made:
        yield made


def connected(api: TlsApi) -> socket.socket:
    """A TCP connection that the api, not only the kernel, has taken."""
    raw = socket.create_connection((LOOPBACK, api.port), timeout=5)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return raw


def shake_hands(api: TlsApi, raw: socket.socket) -> ssl.SSLSocket:
    files = api.tls
    context = client_context(str(files.ca_file), str(files.client_cert_file), str(files.client_key_file))
    return context.wrap_socket(raw, server_hostname=LOOPBACK)


def terminate(api: TlsApi) -> None:
    """SIGTERM; returns once nobody can connect any more."""
    api.kp.processes["api"].terminate()
    wait_for(lambda: not answers(api.port), timeout_seconds=5, poll_seconds=0.01)


def test_a_first_request_that_was_on_its_way_is_answered(api: TlsApi) -> None:
    with shake_hands(api, connected(api)) as client:
        terminate(api)
        time.sleep(0.3)
        client.sendall(REQUEST)
        answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nConnection: close\r\n" in answer
    wait_for(lambda: not api.kp.processes["api"].running, timeout_seconds=5)
    assert api.kp.processes["api"].returncode == 0


def test_a_handshake_that_had_yet_to_begin_is_done_and_the_request_answered(api: TlsApi) -> None:
    raw = connected(api)
    terminate(api)
    time.sleep(0.3)
    with shake_hands(api, raw) as client:
        client.sendall(REQUEST)
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_clients_that_only_hold_connections_do_not_delay_the_end(api: TlsApi) -> None:
    begun = time.monotonic()
    with shake_hands(api, connected(api)), RawConnection(api.kp.port), connected(api):
        terminate(api)
        wait_for(lambda: not api.kp.processes["api"].running, timeout_seconds=9)
    assert time.monotonic() - begun < 9
    assert api.kp.processes["api"].returncode == 0


def test_clients_that_use_their_connections_again_and_again_are_all_answered(api: TlsApi) -> None:
    lost: list[str] = []
    answered: list[bool] = []

    def ask_until_closed(number: int) -> None:
        with RawConnection(api.kp.port) as client:
            closes = False
            while not closes:
                try:
                    answer = client.ask("/capabilities")
                except (OSError, ValueError, AssertionError) as error:
                    lost.append(f"{number}: {error!r}")
                    return
                closes = answer.headers.get("connection") == "close"
                answered.append(closes)
                time.sleep(random.uniform(0.05, 0.8))

    threads = [threading.Thread(target=ask_until_closed, args=(number,)) for number in range(200)]
    for thread in threads:
        thread.start()
    wait_for(lambda: answered.count(False) > 400, timeout_seconds=20)
    api.kp.processes["api"].terminate()
    for thread in threads:
        thread.join(15)
    assert lost == []
    assert answered.count(True) == len(threads)
    wait_for(lambda: not api.kp.processes["api"].running, timeout_seconds=9)
