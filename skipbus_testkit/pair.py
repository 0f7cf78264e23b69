"""Two key providers, their database and their broker in containers, for the time of a ``with`` block.

Everything is made at the start and gone at the end, secrets included. Nothing waits for the servers, because skipbus
starts in any order. One container is one whole key provider with its three processes.

Two networks: ``edge`` is where encryptors come from, and ``link`` has the database and the broker. ``cut_link`` takes
Bob out of ``link``.
"""

from __future__ import annotations

import io
import secrets
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import trustme
from testcontainers.core.container import DockerContainer
from testcontainers.core.docker_client import DockerClient
from testcontainers.core.network import Network
from trustme import KeyType

from skipbus_testkit.container.key_provider import FILES, FOLDER
from skipbus_testkit.provider import CONTROL_PORT, TLS_PORT, Credentials, KeyProvider

Topology = Literal["shared-store"]
_SCRIPTS = Path(__file__).parent / "container"
_FIRST_PROCESS = "/tmp/key_provider.py"  # noqa: S108 -- in a container of its own
_SERVED = ("rsa.pem", "rsa.key", "ecdsa.pem", "ecdsa.key", "ca.pem", "psk.txt")
_READY_SECONDS = 90.0
_POLL_SECONDS = 0.2


class PairError(RuntimeError):
    """The pair does not do what it should; the message has the logs' ends."""


@dataclass(frozen=True)
class Exchanged:
    """A key that both ends were given. The key stays out of the repr."""

    key_id: str
    key: str = field(repr=False)


class SkipPair:
    """``with SkipPair() as pair:`` -- ``pair.alice`` and ``pair.bob`` share keys."""

    def __init__(
        self,
        *,
        image: str = "skipbus:latest",
        database: str = "mysql:9.7",
        broker: str = "rabbitmq:4.0",
        topology: Topology = "shared-store",
        key_ttl_seconds: int = 3600,
        alice_id: str = "KP_Alice",
        bob_id: str = "KP_Bob",
    ) -> None:
        """``database`` is an image of MySQL or MariaDB. Nothing runs before the ``with`` block."""
        if topology != "shared-store":
            raise ValueError(f"topology {topology!r} is not known: use 'shared-store'")
        self._image = image
        self._database_image = database
        self._broker_image = broker
        self._key_ttl_seconds = key_ttl_seconds
        self._ids = {"alice": alice_id, "bob": bob_id}
        self._password = secrets.token_hex(16)
        self._token = secrets.token_hex(16)
        self._at_end = ExitStack()
        self._cut = False

    def __enter__(self) -> Self:
        with ExitStack() as at_failure:
            at_failure.enter_context(self._at_end)
            self._start()
            at_failure.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._at_end.close()

    @property
    def network_name(self) -> str:
        """The engine's network that encryptors in containers join."""
        return self._edge.name

    def exchange(self, size_bits: int = 256, *, source: str = "alice") -> Exchanged:
        """One key's way through both key providers, each answer checked. Raises PairError."""
        at, to = (self.alice, self.bob) if source == "alice" else (self.bob, self.alice)
        issued = at.get("key", remoteSystemID=to.system_id, size=str(size_bits))
        if issued.status != 200:
            raise PairError(f"GET /key at {at.system_id} answered {issued.status}: {issued.error}")
        retrieved = to.get("key", issued.body["keyId"], remoteSystemID=at.system_id)
        if retrieved.status != 200:
            raise PairError(f"GET /key/{{keyId}} at {to.system_id} answered {retrieved.status}: {retrieved.error}")
        if retrieved.body != issued.body:
            raise PairError("the two key providers gave different keys")
        return Exchanged(issued.body["keyId"], issued.body["key"])

    def cut_link(self) -> None:
        """Bob loses the database and the broker; encryptors still reach him. Alice goes on alone."""
        if not self._cut:
            self._link_network("disconnect", "bob")
            self._cut = True

    def heal(self) -> None:
        """The link is back, nobody is paused, slow or failing; returns when keys go both ways. Raises PairError."""
        if self._cut:
            self._link_network("connect", "bob")
            self._cut = False
        for provider in (self.alice, self.bob):
            provider.reset()
        self._await_exchange()

    def expire_all(self) -> None:
        """The time of every key that waits is over: it is refused, and the janitors zeroize it."""
        client = "$(command -v mysql || command -v mariadb)"
        # The end is part of a record's place and of what it is sealed with, so a changed record could not be opened.
        statement = "UPDATE skipbus.key_records SET expires_ms = 1"
        command = ["sh", "-c", f'MYSQL_PWD={self._password} {client} -uskipbus -h127.0.0.1 -e "{statement}"']
        code, output = self._database.get_wrapped_container().exec_run(command)
        if code != 0:
            raise PairError(f"the keys could not be expired: {output.decode(errors='replace')[-500:]}")

    def _start(self) -> None:
        self._edge = self._at_end.enter_context(Network())
        # Internal: the ports of a container are published through `edge`, whatever happens to this one.
        self._link = self._at_end.enter_context(Network(docker_network_kw={"internal": True}))
        folder = Path(self._at_end.enter_context(tempfile.TemporaryDirectory(prefix="skipbus-testkit-")))
        self._database = self._make_database()
        with ThreadPoolExecutor(4) as pool:
            servers = [pool.submit(self._run, made) for made in (self._database, self._make_broker())]
            # Certificates are made while the servers prepare their data.
            made = {name: pool.submit(self._make_kp, name, folder) for name in self._ids}
            self._kps = {name: kp.result() for name, kp in made.items()}
            kps = [pool.submit(self._run, kp) for kp in self._kps.values()]
        for started in (*servers, *kps):
            started.result()
        self.alice, self.bob = (self._provider(name, folder) for name in self._ids)
        for name in self._ids:
            self._link_network("connect", name)
        self._await_exchange()

    def _run(self, container: DockerContainer) -> None:
        # Before the start: one that failed half-way has a container too.
        self._at_end.callback(container.stop)
        container.start()

    def _make_database(self) -> DockerContainer:
        environ = {
            "DATABASE": "skipbus",
            "USER": "skipbus",
            "PASSWORD": self._password,
            "ROOT_PASSWORD": self._password,
        }
        container = DockerContainer(self._database_image).with_network(self._link).with_network_aliases("database")
        container.with_tmpfs_mount("/var/lib/mysql")
        # Both families' images read these names.
        return container.with_envs(**{f"MYSQL_{name}": value for name, value in environ.items()})

    def _make_broker(self) -> DockerContainer:
        container = DockerContainer(self._broker_image).with_network(self._link).with_network_aliases("broker")
        return container.with_envs(RABBITMQ_DEFAULT_USER="skipbus", RABBITMQ_DEFAULT_PASS=self._password)

    def _make_kp(self, name: str, folder: Path) -> DockerContainer:
        (other,) = (system_id for kp, system_id in self._ids.items() if kp != name)
        environ = {
            "SKIP_LOCAL_SYSTEM_ID": self._ids[name],
            "SKIP_REMOTE_SYSTEM_ID_1": other,
            "SKIP_KEY_TTL_SECONDS": str(self._key_ttl_seconds),
            "SKIP_EPOCH_SECONDS": str(max(2, min(600, self._key_ttl_seconds))),
            "SKIP_HEARTBEAT_SECONDS": "1",
            "SKIP_HOST": "0.0.0.0",  # noqa: S104 -- the engine publishes it
            "SKIP_TLS_CERT_FILE": f"{FOLDER}/rsa.pem,{FOLDER}/ecdsa.pem",
            "SKIP_TLS_KEY_FILE": f"{FOLDER}/rsa.key,{FOLDER}/ecdsa.key",
            "SKIP_TLS_CLIENT_CA_FILE": f"{FOLDER}/ca.pem",
            "SKIP_TLS_PSK_FILE": f"{FOLDER}/psk.txt",
            "MYSQL_HOST": "database",
            "MYSQL_USER": "skipbus",
            "MYSQL_PASSWORD": self._password,
            "MYSQL_DATABASE": "skipbus",
            "RABBITMQ_URL": f"amqp://skipbus:{self._password}@broker/",
            "SKIPBUS_TESTKIT_CONTROL_PORT": str(CONTROL_PORT),
            "SKIPBUS_TESTKIT_TOKEN": self._token,
        }
        container = DockerContainer(self._image).with_network(self._edge).with_network_aliases(name)
        container.with_envs(**environ).with_exposed_ports(TLS_PORT, CONTROL_PORT)
        container.with_copy_into_container(_make_files(folder / name, name, self._hosts()), FILES, 0o444)
        container.with_copy_into_container(_SCRIPTS / "key_provider.py", _FIRST_PROCESS, 0o444)
        return container.with_command(["python", _FIRST_PROCESS])

    def _hosts(self) -> list[str]:
        """Where a published port may be reached: which of them it is depends on where the tester's process runs."""
        docker = DockerClient()
        networks = [docker.client.networks.get(network.name) for network in (self._edge, self._link)]
        gateways = {config["Gateway"] for network in networks for config in network.attrs["IPAM"]["Config"]}
        return sorted({"localhost", "127.0.0.1", "::1", docker.host()} | gateways)

    def _provider(self, name: str, folder: Path) -> KeyProvider:
        files = folder / name
        identity, _, psk_hex = (files / "psk.txt").read_text().strip().partition(":")
        credentials = Credentials(identity, psk_hex, files / "ca.pem", files / "client.pem", files / "client.key")
        return KeyProvider(name, self._ids[name], self._kps[name], credentials, self._token)

    def _link_network(self, verb: Literal["connect", "disconnect"], name: str) -> None:
        container = self._kps[name].get_wrapped_container()
        # testcontainers can connect, and has no word for the reverse.
        getattr(container.client.networks.get(self._link.id), verb)(container)

    def _await_exchange(self) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        for source in ("alice", "bob"):
            while True:
                try:
                    self.exchange(source=source)
                    break
                except (OSError, PairError) as error:
                    if time.monotonic() > deadline or self._has_ended():
                        logs = "".join(f"\n--- {kp.system_id}\n{kp.logs[-3000:]}" for kp in (self.alice, self.bob))
                        raise PairError(f"keys are not exchanged: {error}{logs}") from error
                    time.sleep(_POLL_SECONDS)
        for provider in (self.alice, self.bob):
            provider.reset()

    def _has_ended(self) -> bool:
        wrapped = [container.get_wrapped_container() for container in self._kps.values()]
        for container in wrapped:
            container.reload()
        return any(container.status == "exited" for container in wrapped)


def _make_files(folder: Path, name: str, hosts: list[str]) -> bytes:
    """Certificates and a pre-shared key in ``folder``, and what the container needs of them as a tar."""
    folder.mkdir(mode=0o700)
    _make_certificates(folder, name, hosts)
    _write_private(folder / "psk.txt", f"router-at-{name}:{secrets.token_hex(32)}\n".encode())
    octets = io.BytesIO()
    with tarfile.open(fileobj=octets, mode="w") as archive:
        for file in _SERVED:
            archive.add(folder / file, file)
        archive.add(_SCRIPTS / "api.py", "api.py")
    return octets.getvalue()


def _make_certificates(folder: Path, name: str, hosts: list[str]) -> None:
    """An authority, two certificates that it issued for the key provider, and one for its client."""
    authority = trustme.CA(organization_name=f"skipbus testkit {name}", key_type=KeyType.RSA)
    authority.cert_pem.write_to_path(folder / "ca.pem")
    issued = {
        "rsa": authority.issue_cert(name, *hosts, key_type=KeyType.RSA),
        "ecdsa": authority.issue_cert(name, *hosts, key_type=KeyType.ECDSA),
        "client": authority.issue_cert("client", common_name="client"),
    }
    for kind, certificate in issued.items():
        certificate.cert_chain_pems[0].write_to_path(folder / f"{kind}.pem")
        _write_private(folder / f"{kind}.key", certificate.private_key_pem.bytes())


def _write_private(path: Path, content: bytes) -> None:
    path.touch(0o600)
    path.write_bytes(content)
