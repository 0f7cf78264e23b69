"""A peer with an endpoint is sent everything by HTTPS: in order, with retry, and nothing is lost.

KP_Alice's syncer is a real process. The endpoint is the test's own: it answers as it is set to, and puts what it takes
into KP_Bob's queue, as an api does.
"""

from __future__ import annotations

import ipaddress
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sandbox.mariadb import MariaDbServer
from sandbox.rabbitmq import RabbitMqServer
from skipbus.shared.protocol.envelopes import EnvelopeType, SignedEnvelope, read_envelope
from skipbus.shared.store.outbox import KEY_STOCKED
from tests.integration.bus_rig import Site, Sites
from tests.integration.syncer_rig import TIMEOUT_SECONDS, Kp
from tests.system.broker_admin import BrokerAdmin
from tests.waiting import wait_for


@dataclass
class Endpoint:
    """An HTTPS server for one peer; ``answers`` are given one after another, then 202."""

    folder: Path
    rabbitmq_url: str
    target: Kp | None = None
    answers: list[tuple[int, bytes]] = field(default_factory=list)
    seen: list[tuple[int, SignedEnvelope]] = field(default_factory=list)
    most_at_once: int = 0

    def __post_init__(self) -> None:
        self.server = HTTPServer(("127.0.0.1", 0), self._handler())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate(self.folder))
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join(10)
        self.server.server_close()

    def numbers(self, status: int = 202) -> list[int]:
        """Of the kept envelopes that were answered so, in their order."""
        return [
            envelope.header.number
            for answer, envelope in self.seen
            if answer == status and not envelope.header.type.is_live
        ]

    def _serve(self) -> None:
        with BrokerAdmin(self.rabbitmq_url) as self.bus:
            self.server.serve_forever(poll_interval=0.05)

    def _answer(self, body: bytes) -> tuple[int, bytes]:
        envelope = read_envelope(body)
        kept = envelope.header.type in {EnvelopeType.KEY_ISSUED, EnvelopeType.KEY_WITHDRAWN, EnvelopeType.KEY_RETRIEVED}
        status, text = self.answers.pop(0) if kept and self.answers else (202, b'{"status":"accepted"}')
        if status == 202 and self.target is not None:
            self.bus.send(self.target.id, body)
        self.seen.append((status, envelope))
        return status, text

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 5

            def do_POST(self) -> None:
                assert self.path == "/sync"
                status, text = endpoint._answer(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "endpoint")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA384())
    )
    certificate_file, key_file = folder / "endpoint.pem", folder / "endpoint.key"
    certificate_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate_file, key_file


class Scene:
    """KP_Alice reaches KP_Bob by HTTPS; KP_Bob answers over the bus."""

    def __init__(self, alice: Site, bob: Site, endpoint: Endpoint) -> None:
        self.alice, self.bob, self.endpoint = alice, bob, endpoint


@pytest.fixture(scope="module")
def scene(
    mariadb: MariaDbServer, rabbitmq: RabbitMqServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("https_link")
    endpoint = Endpoint(folder, rabbitmq.url)
    with mariadb.databases("https_a", "https_b") as databases, Sites(folder, rabbitmq.url) as sites:
        alice, bob = sites.add("KP_Alice", databases[0]), sites.add("KP_Bob", databases[1])
        endpoint.target = bob.kp
        sites.link(endpoints={bob.kp.id: (endpoint.url, folder / "endpoint.pem")})
        bob.kp.process.start("syncer")
        wait_for(lambda: "broker connected" in bob.kp.log, timeout_seconds=TIMEOUT_SECONDS)
        sites.start(alice, bob)
        yield Scene(alice, bob, endpoint)
    endpoint.close()


def test_keys_and_heartbeats_go_to_the_endpoint(scene: Scene) -> None:
    placed = scene.alice.place(scene.bob, 3)
    scene.alice.wait_placed(placed)
    assert placed.ids <= scene.bob.records().keys()
    types = {envelope.header.type for _, envelope in scene.endpoint.seen}
    assert {EnvelopeType.HEARTBEAT, EnvelopeType.CAPABILITIES, EnvelopeType.KEY_ISSUED} <= types
    wait_for(lambda: scene.bob.rig.online(scene.bob.kp, scene.alice.kp), timeout_seconds=TIMEOUT_SECONDS)


def test_what_passes_is_tried_again_in_order_until_it_is_taken(scene: Scene) -> None:
    scene.endpoint.seen.clear()
    scene.endpoint.answers += [(503, b""), (500, b"x" * 100_000), (429, b"{}"), (503, b"\xff"), (302, b"")]
    placed = []
    for _ in range(5):
        placed.append(scene.alice.place(scene.bob, 2, KEY_STOCKED))
        time.sleep(0.3)
    for one in placed:
        scene.alice.wait_placed(one)
        assert one.ids <= scene.bob.held()
    taken = scene.endpoint.numbers()
    assert taken == sorted(taken)
    assert "Traceback" not in scene.alice.kp.log


def test_an_endpoint_that_is_away_loses_nothing_and_is_told_once(scene: Scene) -> None:
    alice, bob, endpoint = scene.alice, scene.bob, scene.endpoint
    # Nobody accepts connections' requests: the handshake never ends.
    endpoint.server.shutdown()
    away = alice.kp.log.count("peer's endpoint away")
    placed = [alice.place(bob, 1, KEY_STOCKED) for _ in range(3)]
    wait_for(lambda: alice.kp.log.count("peer's endpoint away") == away + 1, timeout_seconds=TIMEOUT_SECONDS)
    assert all(alice.waits(one) for one in placed)
    endpoint.thread.join(10)
    endpoint.thread = threading.Thread(target=endpoint._serve, daemon=True)
    endpoint.thread.start()
    for one in placed:
        alice.wait_placed(one)
        assert one.ids <= bob.held()
    wait_for(lambda: "peer's endpoint back" in alice.kp.log, timeout_seconds=TIMEOUT_SECONDS)
    assert alice.kp.log.count("peer's endpoint away") == away + 1


@pytest.mark.parametrize(("status", "reason"), [(400, "malformed"), (401, "unknown_sender"), (413, "too_large")])
def test_a_refusal_by_the_endpoint_is_told_like_one_by_the_bus(scene: Scene, status: int, reason: str) -> None:
    alice, bob, endpoint = scene.alice, scene.bob, scene.endpoint
    endpoint.answers.append((status, b'{"error":"not like\\nthis"}'))
    refused = alice.place(bob, 1, KEY_STOCKED)

    def shown() -> str:
        row = alice.rig.peer(alice.kp, bob.kp)
        return row.last_refusal if row else ""

    wait_for(lambda: shown() == f"{reason}: {status}: not like?this", timeout_seconds=TIMEOUT_SECONDS)
    # It keeps no other waiting, and is kept itself.
    placed = alice.place(bob, 1, KEY_STOCKED)
    alice.wait_placed(placed)
    assert alice.waits(refused)


def test_an_endpoint_with_a_foreign_certificate_is_sent_nothing(scene: Scene, tmp_path: Path) -> None:
    alice, bob, endpoint = scene.alice, scene.bob, scene.endpoint
    certificate(tmp_path)
    ca_file = endpoint.folder / "endpoint.pem"
    right = ca_file.read_bytes()
    alice.kp.process.stop("syncer")
    ca_file.write_bytes((tmp_path / "endpoint.pem").read_bytes())
    seen = len(endpoint.seen)
    alice.kp.process.start("syncer")
    try:
        placed = alice.place(bob, 1, KEY_STOCKED)
        wait_for(lambda: "CERTIFICATE_VERIFY_FAILED" in alice.kp.log, timeout_seconds=TIMEOUT_SECONDS)
        assert len(endpoint.seen) == seen
    finally:
        alice.kp.process.stop("syncer")
        ca_file.write_bytes(right)
        alice.kp.process.start("syncer")
    alice.wait_placed(placed)


def test_a_syncer_without_such_a_peer_loads_no_http_client() -> None:
    command = "import sys, skipbus.services.syncer.__main__; sys.exit('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], timeout=60, check=False).returncode == 0
