"""An api process with TLS and without a store, and clients for it that nobody here wrote.

`/capabilities` and `/entropy` need no store, so that one process is enough to see who gets through a handshake. The
clients are `openssl s_client`, curl and tlslite-ng; raw sockets stand for those who do not behave.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from sandbox.client import get
from sandbox.key_provider import KeyProvider
from sandbox.mariadb import Database
from sandbox.ports import LOOPBACK, free_port
from sandbox.processes import Startable
from sandbox.tls_files import TlsFiles
from tests.system.harness import log_lines
from tests.waiting import wait_for

# By the names of key providers; gone with this process.
_PREPARED: dict[str, TemporaryDirectory[str]] = {}
REQUEST = "GET /capabilities HTTP/1.1\r\nHost: kp\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True)
class Seen:
    """What a client saw: the body, or nothing where it was refused; the suite; and all that it printed."""

    body: dict[str, Any] | None
    cipher: str
    output: str

    @property
    def served(self) -> bool:
        return self.body is not None and "localSystemID" in self.body


class TlsApi(Startable):
    """One api process on a TLS port. Its store is not there."""

    def __init__(self, root: Path, env: Mapping[str, str] | None = None) -> None:
        nowhere = Database(LOOPBACK, free_port(), "nobody", "no-password-here", "nothing")
        self.kp = KeyProvider("KP_Alice", ["KP_Bob"], nowhere, "amqp://nobody:nothing@127.0.0.1/", root=root)
        self.kp.serve_tls(free_port())
        self.kp.environ |= env or {}
        self.kp.environ = {name: value for name, value in self.kp.environ.items() if value}

    @property
    def tls(self) -> TlsFiles:
        assert self.kp.tls is not None
        return self.kp.tls

    @property
    def port(self) -> int:
        return self.tls.port

    def prepare(self) -> None:
        """Keyring, certificates and a pre-shared key; may be changed before `start`.

        They are made once for a name of a key provider, as an operator makes them, and then copied: what is tested
        here is who gets in with them, and they take seconds of a processor.
        """
        system_id = self.kp.environ["SKIP_LOCAL_SYSTEM_ID"]
        kept = _PREPARED.get(system_id)
        if kept is None:
            self.kp.run_skipctl("keyring", "init")
            self.kp.run_skipctl("cert", "init", str(self.tls.folder))
            self.kp.run_skipctl("psk", "add", self.tls.psk_identity, "--file", str(self.tls.psk_file))
            kept = _PREPARED[system_id] = TemporaryDirectory(prefix="skipbus-tls-")
            self._copy(self.kp.root, Path(kept.name))
        else:
            self._copy(Path(kept.name), self.kp.root)

    def _copy(self, source: Path, target: Path) -> None:
        for folder in (self.kp.keyring_dir, self.tls.folder):
            place = folder.relative_to(self.kp.root)
            shutil.copytree(source / place, target / place)

    def start(self) -> None:
        """Returns once the TLS port is served."""
        if not self.kp.keyring_dir.exists():
            self.prepare()
        self.kp.start("api")
        wait_for(lambda: bool(self.lines("listening", tls=True)), timeout_seconds=20)

    def stop(self) -> None:
        """Ends it; no key stands in its log."""
        self.kp.stop_all()
        assert self.tls.psk_hex not in self.kp.log_of("api").read_text()

    def lines(self, event: str, **fields: object) -> list[dict[str, Any]]:
        """Log lines of one event whose fields are these."""
        return [
            line
            for line in log_lines(self.kp, "api")
            if line["event"] == event and all(line.get(name) == value for name, value in fields.items())
        ]

    def refusal(self, before: int) -> dict[str, Any]:
        """The one refused handshake since there were `before` of them."""
        return self.one_more(before, "handshake refused")

    def one_more(self, before: int, event: str, **fields: object) -> dict[str, Any]:
        """The one line since there were `before` of them. It is written when the answer may be read already."""
        wait_for(lambda: len(self.lines(event, **fields)) > before, timeout_seconds=10)
        (line,) = self.lines(event, **fields)[before:]
        return line

    def refusals(self) -> int:
        return len(self.lines("handshake refused"))

    def psk(self, identity: str | None = None, key_hex: str | None = None) -> list[str]:
        """Arguments of s_client."""
        return ["-psk_identity", identity or self.tls.psk_identity, "-psk", key_hex or self.tls.psk_hex]

    def certificate(self) -> list[str]:
        """Arguments of s_client."""
        return ["-cert", str(self.tls.client_cert_file), "-key", str(self.tls.client_key_file)]

    def warnings(self) -> list[str]:
        warnings = get(self.kp.url, "health").body["warnings"]
        assert isinstance(warnings, list)
        return warnings


def s_client(port: int, *arguments: str, request: str = REQUEST) -> Seen:
    """One request by `openssl s_client`, which reads to the end."""
    result = subprocess.run(
        ["openssl", "s_client", "-connect", f"{LOOPBACK}:{port}", "-ign_eof", *arguments],
        input=request,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=20,
        check=False,
    )
    return _seen(result.stdout, result.stdout + result.stderr)


def openssl(*arguments: str, folder: Path) -> None:
    """One of its other commands."""
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=30)


def expired_certificate(api: TlsApi, folder: Path) -> list[str]:
    """Arguments of s_client: a certificate of the right authority that ended yesterday.

    No one command makes it with OpenSSL 3.0 and with 3.5.
    """
    now = datetime.now(UTC)
    key = ec.generate_private_key(ec.SECP384R1())
    authority = load_pem_private_key((api.tls.folder / "ca.key").read_bytes(), password=None)
    assert isinstance(authority, rsa.RSAPrivateKey)
    made = x509.CertificateBuilder(
        issuer_name=x509.load_pem_x509_certificate(api.tls.ca_file.read_bytes()).subject,
        subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "late")]),
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - timedelta(days=2),
        not_valid_after=now - timedelta(days=1),
    ).sign(authority, SHA384())
    (folder / "c").write_bytes(made.public_bytes(Encoding.PEM))
    (folder / "k").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return ["-cert", f"{folder}/c", "-key", f"{folder}/k"]


def renegotiate(port: int, *arguments: str) -> str:
    """What `openssl s_client` prints when it has to renegotiate."""
    command = ["openssl", "s_client", "-connect", f"{LOOPBACK}:{port}", *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as client:
        assert client.stdin is not None
        client.stdin.write("R\n")
        client.stdin.flush()
        # It takes the R for a command only when that comes alone, and ends with its input.
        time.sleep(1)
        output, _ = client.communicate(timeout=10)
    return output


def curl(port: int, *arguments: str, path: str = "/capabilities") -> Seen:
    """One request by curl; `-v` tells the suite."""
    result = subprocess.run(
        ["curl", "-sv", "--max-time", "15", *arguments, f"https://{LOOPBACK}:{port}{path}"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return _seen(result.stdout, result.stdout + result.stderr)


def _seen(answer: str, output: str) -> Seen:
    found = re.search(r'^\{"[^{}]*\}', answer, re.MULTILINE)
    cipher = re.search(r"Cipher is (\S+)|SSL connection using \S+ / (\S+)", output)
    return Seen(json.loads(found[0]) if found else None, (cipher[1] or cipher[2]) if cipher else "", output)


def tlslite_psk(
    port: int, identity: bytes, key: bytes, digest: str, cipher: str, more: Sequence[tuple[bytes, bytes, str]] = ()
) -> tuple[bytes, str]:
    """One request by tlslite-ng with a TLS 1.3 pre-shared key: the answer and the suite. Raises its errors."""
    with warnings.catch_warnings():
        # It imports what Python 3.12 has removed, and does without.
        warnings.simplefilter("ignore", DeprecationWarning)
        from tlslite.api import HandshakeSettings, TLSConnection  # noqa: PLC0415

    settings = HandshakeSettings()
    settings.minVersion = settings.maxVersion = (3, 4)
    settings.pskConfigs = [(identity, key, digest), *more]
    settings.cipherNames = [cipher]
    with socket.create_connection((LOOPBACK, port), timeout=10) as raw:
        connection = TLSConnection(raw)
        connection.handshakeClientCert(settings=settings)
        connection.write(REQUEST.encode())
        answer = bytes(connection.read(min=1, max=4096))
        return answer, str(connection.session.getCipherName())
