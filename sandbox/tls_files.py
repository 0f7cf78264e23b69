"""What one key provider of the sandbox serves TLS with: where it lies, and how a client gets in.

Owns names and paths. The files themselves are made by `skipctl cert` and `skipctl psk`, as an operator would.
"""

from __future__ import annotations

from pathlib import Path

from sandbox.ports import LOOPBACK
from skipbus.shared.protocol.psk_file import read_psk_file


class TlsFiles:
    """Certificates for server and client, and one pre-shared key, in one folder."""

    client = "client"

    def __init__(self, folder: Path, system_id: str, port: int) -> None:
        self.folder = folder
        self.port = port
        self.address = f"{LOOPBACK}:{port}"
        self.url = f"https://{self.address}"
        self.psk_identity = f"router-at-{system_id}"
        self.psk_file = folder / "psk.txt"
        self.ca_file = folder / "ca.pem"
        self.client_cert_file = folder / f"{self.client}.pem"
        self.client_key_file = folder / f"{self.client}.key"

    def environ(self) -> dict[str, str]:
        """What the api is configured with."""
        return {
            "SKIP_TLS_PORT": str(self.port),
            "SKIP_TLS_CERT_FILE": f"{self.folder}/rsa.pem,{self.folder}/ecdsa.pem",
            "SKIP_TLS_KEY_FILE": f"{self.folder}/rsa.key,{self.folder}/ecdsa.key",
            "SKIP_TLS_CLIENT_CA_FILE": str(self.ca_file),
            "SKIP_TLS_PSK_FILE": str(self.psk_file),
        }

    def state(self) -> dict[str, str]:
        """What the demo's state file tells; it is its owner's alone."""
        return {
            "https": self.url,
            "psk_identity": self.psk_identity,
            "psk_hex": self.psk_hex,
            "ca_file": str(self.ca_file),
            "client_cert_file": str(self.client_cert_file),
            "client_key_file": str(self.client_key_file),
        }

    @property
    def psk_hex(self) -> str:
        """The key, as a client wants it."""
        return read_psk_file(self.psk_file)[self.psk_identity.encode()].hex()
