"""A private RabbitMQ server: one node with an epmd of its own."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from sandbox.federation import PLUGINS, Account, Upstream, definitions, upstream_uri
from sandbox.ports import LOOPBACK, answers, free_port
from sandbox.processes import Child, find_program, minimal_environ, write_private
from sandbox.server import Server

_COMPOSE = Path(__file__).resolve().parent.parent / "compose"
_EPMD_SECONDS = 10.0


@dataclass
class Cluster:
    """What the nodes of a cluster have in common. `node_names` grows as they are made."""

    epmd_port: int = field(default_factory=free_port)
    cookie: str = field(default_factory=lambda: secrets.token_hex(16))
    password: str = field(default_factory=lambda: secrets.token_hex(16))
    node_names: list[str] = field(default_factory=list)


class RabbitMqServer(Server):
    """A private RabbitMQ node with an epmd of its own."""

    name = "RabbitMQ"

    def __init__(
        self,
        root: Path,
        *,
        port: int | None = None,
        log: Path | None = None,
        dist_port: int | None = None,
        epmd_port: int | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        """A node of a cluster uses the epmd, the cookie and the accounts of that."""
        super().__init__(root, log)
        self.host = LOOPBACK
        self.port = port or free_port()
        self.dist_port = dist_port or free_port()
        self._cluster = cluster
        self.epmd_port = cluster.epmd_port if cluster else epmd_port or free_port()
        self.user = "skipbus"
        self.password = cluster.password if cluster else secrets.token_hex(16)
        self.federation_password = secrets.token_hex(16)
        self._upstreams: Mapping[str, Sequence[Upstream]] = {}
        self.node_name = f"skipbus-{secrets.token_hex(4)}@localhost"
        if cluster is not None:
            cluster.node_names.append(self.node_name)
        # The wrapper of that name in /usr/sbin changes to another user, who may not read our folder.
        self.program = _rabbitmq_program()
        self._epmd: Child | None = None

    @property
    def url(self) -> str:
        return f"amqp://{self.user}:{self.password}@{self.host}:{self.port}/"

    def url_of(self, vhost: str) -> str:
        """The URL of one virtual host; that of `/` is `url`."""
        return self.url if vhost == "/" else self.url + quote(vhost, safe="")

    def upstream(self, name: str, port: int | None = None, vhost: str = "/") -> Upstream:
        """This broker as others fetch from it, by way of another port (a cable's) if that is given."""
        return Upstream(name, upstream_uri(self.federation_password, self.host, port or self.port, vhost))

    def federate(self, upstreams: Mapping[str, Sequence[Upstream]]) -> None:
        """Virtual host -> the brokers to fetch envelopes from; to be said before the start."""
        self._upstreams = upstreams

    def launch(self) -> None:
        self._write_configuration()
        if self._cluster is None:
            self._launch_epmd()
        self._child = Child([self.program], environ=self.environ, log=self.log, cwd=self.root)

    def stop(self) -> None:
        super().stop()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd = None

    @property
    def environ(self) -> dict[str, str]:
        """What the node, and rabbitmqctl for it, must be started with."""
        root = str(self.root)
        return {
            # The Erlang cookie is made in the home folder.
            **minimal_environ(self.root),
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": self.host,
            "RABBITMQ_NODENAME": self.node_name,
            "RABBITMQ_NODE_IP_ADDRESS": self.host,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            # One scheduler thread must not be tied to one core: other servers share them.
            "RABBITMQ_SCHEDULER_BIND_TYPE": "u",
            "RABBITMQ_MNESIA_BASE": f"{root}/mnesia",
            "RABBITMQ_LOG_BASE": f"{root}/log",
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(self.pid_file),
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{root}/enabled_plugins",
            "RABBITMQ_CONFIG_FILE": f"{root}/rabbitmq.conf",
            # The machine's own configuration is not ours to follow.
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{root}/advanced.config",
            "RABBITMQ_CONF_ENV_FILE": f"{root}/rabbitmq-env.conf",
            "RABBITMQ_GENERATED_CONFIG_DIR": f"{root}/generated",
            "RABBITMQ_SCHEMA_DIR": f"{root}/schema",
            # The start script then becomes the node itself instead of a shell around it, so that its pid is
            # the node's and the kernel's signal at our death reaches the node.
            "detached": "1",
        }

    def _write_configuration(self) -> None:
        (self.root / "enabled_plugins").write_text(f"[{PLUGINS if self._upstreams else ''}].\n")
        (self.root / "rabbitmq-env.conf").write_text("")
        write_private(
            self.root / "rabbitmq.conf",
            f"listeners.tcp.1 = {self.host}:{self.port}\n"
            f"default_user = {self.user}\n"
            f"default_pass = {self.password}\n"
            "disk_free_limit.absolute = 20MB\n"
            f"{_shipped_message_limit()}\n"
            # Quorum queues reserve their write-ahead log's full size on disk.
            "raft.wal_max_size_bytes = 33554432\n" + self._write_definitions() + self._join_cluster(),
        )

    def _join_cluster(self) -> str:
        """The lines of the configuration by which the node finds the others, if it is one of a cluster."""
        if self._cluster is None:
            return ""
        cookie = self.root / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text(self._cluster.cookie)
            cookie.chmod(0o400)
        names = enumerate(self._cluster.node_names, 1)
        return (
            "cluster_formation.peer_discovery_backend = classic_config\n"
            # A node that has lost the majority must not go on alone.
            "cluster_partition_handling = pause_minority\n"
            + "".join(f"cluster_formation.classic_config.nodes.{number} = {name}\n" for number, name in names)
        )

    def _write_definitions(self) -> str:
        """The line of the configuration that names them, if there are any."""
        if not self._upstreams:
            return ""
        file = self.root / "definitions.json"
        write_private(file, definitions(Account(self.user, self.password), self.federation_password, self._upstreams))
        return f"load_definitions = {file}\n"

    def _launch_epmd(self) -> None:
        if self._epmd is None or not self._epmd.running:
            # The node would start a stray epmd of its own if it found none.
            self._epmd = start_epmd(self.epmd_port, self.environ, self.root)

    def _serves(self) -> bool:
        """Whether the broker greets: RabbitMQ listens only when it has booted."""
        try:
            with socket.create_connection((self.host, self.port), timeout=5) as connection:
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                # A method frame (type 1) on channel 0: Connection.Start.
                return connection.recv(3) == b"\x01\x00\x00"
        except OSError:
            return False


def start_epmd(port: int, environ: Mapping[str, str], folder: Path) -> Child:
    """Erlang's directory of nodes. Returns once it answers. Raises SandboxError."""
    command = [find_program("epmd"), "-port", str(port), "-address", LOOPBACK]
    epmd = Child(command, environ=environ, log=folder / "epmd.log", cwd=folder)
    epmd.wait_ready(lambda: answers(port), "epmd", _EPMD_SECONDS)
    return epmd


def _shipped_message_limit() -> str:
    """The line that operators are given for it."""
    lines = (_COMPOSE / "rabbitmq" / "rabbitmq.conf").read_text().splitlines()
    (limit,) = [line for line in lines if line.startswith("max_message_size ")]
    return limit


def _rabbitmq_program() -> str:
    debian = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
    return str(debian) if debian.exists() else find_program("rabbitmq-server")
