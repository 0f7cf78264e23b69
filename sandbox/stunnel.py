"""stunnel in front of a key provider's plain port, by the very configuration that operators are given.

Owns what is put in place of that file's paths and ports. The keys are the key provider's own file.
"""

from __future__ import annotations

from pathlib import Path

from sandbox.key_provider import KeyProvider
from sandbox.ports import LOOPBACK, answers, free_port
from sandbox.processes import Child, SandboxError, Startable, find_program, minimal_environ

_CONFIGURATION = Path(__file__).resolve().parent.parent / "compose" / "stunnel" / "stunnel.conf"
_START_SECONDS = 10.0


class Stunnel(Startable):
    """One stunnel. `client_certificates=False` lets in clients that show nothing, as wrk."""

    def __init__(
        self, key_provider: KeyProvider, root: Path, *, server: str = "rsa", client_certificates: bool = True
    ) -> None:
        """`server` names the certificate. Raises SandboxError when the key provider serves no TLS."""
        if key_provider.tls is None:
            raise SandboxError(f"{key_provider.system_id} has no certificates and keys")
        self.port = free_port()
        self._root = root
        self.log = root / "stunnel.log"
        folder = key_provider.tls.folder
        text = _CONFIGURATION.read_text()
        for old, new in (
            ("accept = 8443", f"accept = {LOOPBACK}:{self.port}"),
            ("connect = 127.0.0.1:8080", f"connect = {LOOPBACK}:{key_provider.port}"),
            ("/etc/stunnel/psk.txt", str(key_provider.tls.psk_file)),
            ("/etc/stunnel/server", f"{folder}/{server}"),
            ("/etc/stunnel/ca.pem", str(folder / "ca.pem")),
            # Tests wait for it.
            ("TIMEOUTbusy = 10", "TIMEOUTbusy = 2"),
            ("debug = notice", "debug = notice" if client_certificates else "debug = crit"),
            *([] if client_certificates else [("verifyChain = yes", "")]),
        ):
            if old not in text:
                raise SandboxError(f"{_CONFIGURATION} has no {old!r}")
            text = text.replace(old, new)
        self._file = root / "stunnel.conf"
        self._file.write_text(text)
        self.child: Child | None = None

    def start(self) -> None:
        command = [find_program("stunnel4", "stunnel"), str(self._file)]
        self.child = Child(command, environ=minimal_environ(self._root), log=self.log, cwd=self._root)
        self.child.wait_ready(lambda: answers(self.port), "stunnel", _START_SECONDS)

    def stop(self) -> None:
        if self.child is not None:
            self.child.stop(2)
