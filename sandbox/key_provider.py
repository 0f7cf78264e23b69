"""One key provider as an operator would run it: its environment, its keyring, its three processes.

The processes get their whole configuration from the environment made here and from secret files, nothing of
the caller's own environment. Their logs are files that grow over restarts: a test can search all of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox.client import get
from sandbox.mariadb import Database
from sandbox.ports import LOOPBACK, free_port
from sandbox.processes import Child, SandboxError, minimal_environ, tail, wait_until, write_private
from sandbox.tls_files import TlsFiles
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.settings.peers import identity_line
from skipbus_testkit.client import Answer, request_target

ROLES = ("api", "syncer", "janitor")
# A service drains for at most 10 s.
STOP_SECONDS = 12.0
# A key provider seals only to a peer that has announced itself, which may be a moment after both are healthy.
ANNOUNCED_SECONDS = 30.0

_REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class BusPeer:
    """A peer with a store of its own, as it stands in the configuration of the other one."""

    system_id: str
    identity: str
    stock: int = 64
    endpoint: str | None = None
    endpoint_ca_file: Path | None = None
    allow: Sequence[str] | None = None

    def toml(self) -> str:
        """Its `[[peers]]` table. JSON's strings and lists are TOML's."""
        fields = {
            "system_id": self.system_id,
            "link": "bus",
            "identity": self.identity,
            "stock": self.stock,
            "endpoint": self.endpoint,
            "endpoint_ca_file": str(self.endpoint_ca_file) if self.endpoint_ca_file else None,
            "allow": self.allow,
        }
        lines = [f"{name} = {json.dumps(value)}" for name, value in fields.items() if value is not None]
        return "\n".join(["[[peers]]", *lines, ""])


class KeyProvider:
    """A key provider over a store and a broker that run already."""

    def __init__(
        self,
        system_id: str,
        remote_ids: Sequence[str],
        mysql: Database,
        rabbitmq: str,
        port: int | None = None,
        *,
        root: Path,
        log_dir: Path | None = None,
        env_overrides: Mapping[str, str] | None = None,
    ) -> None:
        """`rabbitmq` is the broker's URL. A later KeyProvider with the same root finds the same keyring."""
        self.system_id = system_id
        self.port = port or free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"
        self.root = root
        self.keyring_dir = root / "keyring"
        self.log_dir = log_dir or root / "logs"
        self.processes: dict[str, Child] = {}
        self.tls: TlsFiles | None = None
        # What only one of the processes is given, such as its metrics port.
        self.environ_of: dict[str, dict[str, str]] = {}
        # What the interpreter runs a process's module by. The bench puts a profiler there.
        self.run_module: Sequence[str] = ("-m",)
        self.environ = self._write_environ(remote_ids, mysql, rabbitmq) | dict(env_overrides or {})

    def serve_tls(self, port: int) -> None:
        """Have the api serve pre-shared keys and client certificates too; to be said before it starts."""
        self.tls = TlsFiles(self.root / "tls", self.system_id, port)
        self.environ = self.tls.environ() | self.environ

    @property
    def identity(self) -> str:
        """Its public key, as other key providers write it into their configuration; there must be a keyring."""
        return identity_line(Keyring.open(self.keyring_dir, self.system_id).identity.public_key)

    def link_by_bus(self, *peers: BusPeer) -> None:
        """Write the peers that have stores of their own into the configuration; to be said before the start."""
        file = self.root / "skipbus.toml"
        write_private(file, "\n".join(peer.toml() for peer in peers))
        self.environ["SKIP_CONFIG_FILE"] = str(file)

    def start_all(self) -> None:
        """Make the keyring where there is none, and start the three processes without waiting for health."""
        self.make_files()
        for role in ROLES:
            self.start(role)

    def make_files(self) -> None:
        """Make the keyring, and what TLS needs, where there is none."""
        if not self.keyring_dir.exists():
            # As `skipctl keyring init` does, without a process of its own.
            Keyring.create(self.keyring_dir, self.system_id)
        if self.tls is not None and not self.tls.folder.exists():
            self.run_skipctl("cert", "init", str(self.tls.folder), "--client", self.tls.client)
            self.run_skipctl("psk", "add", self.tls.psk_identity)

    def start(self, role: str) -> Child:
        """Start one process unless it runs."""
        running = self.processes.get(role)
        if running is not None and running.running:
            return running
        command = [sys.executable, *self.run_module, f"skipbus.services.{role}"]
        environ = self.environ | self.environ_of.get(role, {})
        child = Child(command, environ=environ, log=self.log_of(role), cwd=self.root)
        self.processes[role] = child
        return child

    def stop(self, role: str) -> None:
        """SIGTERM, and SIGKILL when it does not drain in time."""
        self.processes[role].stop(STOP_SECONDS)

    def kill(self, role: str) -> None:
        """SIGKILL, as a crash would."""
        self.processes[role].kill()

    def stop_all(self) -> None:
        self.terminate_all()
        for child in self.processes.values():
            child.stop(STOP_SECONDS)

    def terminate_all(self) -> None:
        """Ask all to end, without waiting, so that they drain at the same time."""
        for child in self.processes.values():
            child.terminate()

    def log_of(self, role: str) -> Path:
        return self.log_dir / f"{role}.log"

    def wait_healthy(self, timeout_seconds: float = 30) -> None:
        """Wait until `GET /health` answers 200. Raises SandboxError with the logs' ends."""

        def is_up() -> bool:
            if self.is_healthy():
                return True
            if ended := [role for role, child in self.processes.items() if not child.running]:
                codes = ", ".join(f"{role} with {self.processes[role].returncode}" for role in ended)
                raise SandboxError(self._logs(f"{self.system_id}: ended while starting: {codes}", *ended))
            return False

        wait_until(is_up, lambda: self._logs(f"{self.system_id} to be healthy", *ROLES), timeout_seconds)

    def is_healthy(self) -> bool:
        try:
            return get(self.url, "health", timeout_seconds=5).status == 200
        except (OSError, ValueError):
            return False

    def key_url(self, remote: KeyProvider) -> str:
        """`GET /key` here for a remote key provider."""
        return self.url + request_target("key", remoteSystemID=remote.system_id)

    def wait_key(self, remote_id: str, timeout_seconds: float = ANNOUNCED_SECONDS) -> Answer:
        """The first key for a remote system, once this key provider can seal to it. Raises SandboxError."""
        answer = Answer(0, {}, b"")

        def is_answered() -> bool:
            nonlocal answer
            answer = get(self.url, "key", remoteSystemID=remote_id)
            return answer.status == 200

        what = f"{self.system_id} to issue a key for {remote_id}"
        wait_until(is_answered, lambda: f"{what}: {answer.status} {answer.error}", timeout_seconds)
        return answer

    def run_skipctl(self, *arguments: str) -> str:
        """Run `skipctl` in this key provider's environment; its output. Raises SandboxError."""
        result = subprocess.run(
            [sys.executable, "-m", "skipbus.ctl", *arguments],
            env=self.environ,
            cwd=self.root,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise SandboxError(
                f"skipctl {' '.join(arguments)} for {self.system_id} ended with {result.returncode}\n"
                f"{result.stdout}{result.stderr}"
            )
        return result.stdout

    def _logs(self, what: str, *roles: str) -> str:
        return what + "".join(f"\n--- {role}.log\n{tail(self.log_of(role))}" for role in roles)

    def _write_environ(self, remote_ids: Sequence[str], mysql: Database, rabbitmq: str) -> dict[str, str]:
        secrets_dir = self.root / "secrets"
        for folder in (self.root, self.log_dir, secrets_dir):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(secrets_dir / "mysql_password", mysql.password)
        write_private(secrets_dir / "rabbitmq_url", rabbitmq)
        remotes = {f"SKIP_REMOTE_SYSTEM_ID_{n}": remote for n, remote in enumerate(remote_ids, start=1)}
        return {
            **minimal_environ(home=self.root),
            # `-m skipbus.services.api` must find this clone from any working folder, installed or not.
            "PYTHONPATH": str(_REPOSITORY),
            "SKIP_ENV": "production",
            "SKIP_LOCAL_SYSTEM_ID": self.system_id,
            **remotes,
            "MYSQL_HOST": mysql.host,
            "MYSQL_PORT": str(mysql.port),
            "MYSQL_USER": mysql.user,
            "MYSQL_PASSWORD_FILE": str(secrets_dir / "mysql_password"),
            "MYSQL_DATABASE": mysql.database,
            "RABBITMQ_URL_FILE": str(secrets_dir / "rabbitmq_url"),
            "SKIP_KEYRING_DIR": str(self.keyring_dir),
            "SKIP_HOST": LOOPBACK,
            "SKIP_PORT": str(self.port),
        }


def peer_status(kp: KeyProvider, peer_id: str) -> dict[str, Any]:
    """A peer as `/status/sync` shows it."""
    return dict(get(kp.url, "status", "sync").body["peers"][peer_id])


def stock_of(kp: KeyProvider, peer_id: str) -> dict[str, Any]:
    """What a key provider says of its stock at a peer."""
    return dict(peer_status(kp, peer_id).get("stock") or {})
