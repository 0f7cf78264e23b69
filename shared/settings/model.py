"""The settings of a key provider: one frozen object, and for each field its variable, TOML place, default and meaning.

Rules: a setting is declared here and nowhere else; its type says what it accepts. Names of the earlier server keep
their meaning. A secret must not be in the TOML file; a file that `<variable>_FILE` names may hold it. Units are in the
names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, get_type_hints

from msgspec import Meta

from skipbus.shared.settings.peers import Link, PeerSettings
from skipbus.shared.settings.secret import Secret
from skipbus.shared.settings.values import (
    NO_FILE,
    AccountName,
    AmqpUrls,
    Count,
    DatabaseName,
    Environment,
    Folder,
    Host,
    Hosts,
    LogLevel,
    OneFile,
    Password,
    Port,
    SystemId,
    TwoFiles,
    Wait,
    split_address,
    wants,
)


@dataclass(frozen=True)
class Setting:
    """What an operator knows of a field. `default` is a text as a variable holds it; None: it is required."""

    variable: str
    place: str
    default: str | None
    help: str


@dataclass(frozen=True)
class MySqlSettings:
    """How this process reaches the store."""

    host: Annotated[
        Hosts,
        Setting(
            "MYSQL_HOST",
            "mysql.host",
            "127.0.0.1",
            "the store's host; for a cluster several, `db1,db2:3307`: the first that serves is used until it fails",
        ),
    ]
    port: Annotated[Port, Setting("MYSQL_PORT", "mysql.port", "3306", "the store's port, of hosts that name none")]
    user: Annotated[AccountName, Setting("MYSQL_USER", "mysql.user", None, "this process's account at the store")]
    password: Annotated[Password, Setting("MYSQL_PASSWORD", "mysql.password", None, "the account's password")]
    database: Annotated[DatabaseName, Setting("MYSQL_DATABASE", "mysql.database", None, "the store's database")]

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """The store's servers, in the order in which they are tried."""
        split = (split_address(part.strip()) for part in self.host.split(","))
        return tuple((host, port or self.port) for host, port in split)


# fmt: off
@dataclass(frozen=True)
class TlsSettings:
    """How the api serves TLS itself. `identities` maps patterns to what those callers may ask for."""

    port: Annotated[Port, Setting("SKIP_TLS_PORT", "tls.port", "8443",
        "the port for TLS on SKIP_HOST, served if there is a certificate or a file of pre-shared keys")]
    cert_files: Annotated[TwoFiles, Setting("SKIP_TLS_CERT_FILE", "tls.cert_file", NO_FILE,
        "certificate chain in PEM; an RSA and an ECDSA one may both be given, with a comma between them")]
    key_files: Annotated[TwoFiles, Setting("SKIP_TLS_KEY_FILE", "tls.key_file", NO_FILE,
        "the private key of each certificate chain, in PEM without a password, in the same order")]
    client_ca_files: Annotated[OneFile, Setting("SKIP_TLS_CLIENT_CA_FILE", "tls.client_ca_file", NO_FILE,
        "authorities in PEM; a client without a pre-shared key must then have a certificate from one of them")]
    psk_files: Annotated[OneFile, Setting("SKIP_TLS_PSK_FILE", "tls.psk_file", NO_FILE,
        "pre-shared keys, one line of identity:hex for each, as stunnel reads them")]
    handshake_timeout_seconds: Annotated[Wait, Setting("SKIP_TLS_HANDSHAKE_TIMEOUT_SECONDS",
        "tls.handshake_timeout_seconds", "10", "how long a client may take for a TLS handshake")]
    max_connections_per_address: Annotated[Count, Setting("SKIP_MAX_CONNECTIONS_PER_ADDRESS",
        "tls.max_connections_per_address", "1000", "TLS connections of one client address to one api process")]
    identities: Mapping[str, tuple[str, ...]] = field(hash=False)

    @property
    def enabled(self) -> bool:
        """Whether there is anything to serve TLS with."""
        return bool(self.cert_files or self.psk_files)


@dataclass(frozen=True)
class Settings:
    """Everything that a process is configured with.

    `origins` says where each value came from, `service_links` which variables an orchestrator has set and are ignored.
    """

    environment: Annotated[Environment, Setting("SKIP_ENV", "environment", "production",
        "production writes JSON log lines, development readable ones; without it FLASK_ENV is read")]
    debug: Annotated[bool, Setting("SKIP_DEBUG", "debug", "false", "true sets the log level to debug")]
    local_system_id: Annotated[SystemId, Setting("SKIP_LOCAL_SYSTEM_ID", "local_system_id", None,
        "this key provider's own id")]
    remote_system_ids: tuple[str, ...]
    mysql: MySqlSettings
    rabbitmq_url: Annotated[AmqpUrls, Setting("RABBITMQ_URL", "rabbitmq.url", "amqp://guest:guest@127.0.0.1:5672/",
        "the broker, with this process's account; amqps:// for TLS; for a cluster several, tried in turn")]
    keyring_dir: Annotated[Folder, Setting("SKIP_KEYRING_DIR", "keyring.dir", "/var/lib/skipbus/keyring",
        "the folder of this key provider's private keys")]
    key_ttl_seconds: Annotated[int, Meta(ge=1, le=604_800), Setting("SKIP_KEY_TTL_SECONDS", "keys.ttl_seconds", "3600",
        "how long a key lives; set it alike at all key providers")]
    epoch_seconds: Annotated[int, Meta(ge=2, le=86_400), Setting("SKIP_EPOCH_SECONDS", "keys.epoch_seconds", "600",
        "how long keys are sealed to one key pair; at least 1/2048 of a key's lifetime")]
    host: Annotated[Host, Setting("SKIP_HOST", "api.host", "127.0.0.1", "the address that the api listens on")]
    port: Annotated[Port, Setting("SKIP_PORT", "api.port", "8080", "the port that the api listens on")]
    allow_plaintext: Annotated[bool, Setting("SKIP_ALLOW_PLAINTEXT", "api.allow_plaintext", "false",
        "true serves SKIP_PORT, without TLS, on SKIP_HOST even if that is not this host alone")]
    tls: TlsSettings
    api_workers: Annotated[int, Meta(ge=1, le=64), Setting("SKIP_API_WORKERS", "api.workers", "1",
        "api processes that share the port")]
    request_timeout_seconds: Annotated[Wait, Setting("SKIP_REQUEST_TIMEOUT_SECONDS", "api.request_timeout_seconds", "5",
        "how long a caller may wait for the store")]
    header_timeout_seconds: Annotated[Wait, Setting("SKIP_HEADER_TIMEOUT_SECONDS", "api.header_timeout_seconds", "10",
        "how long a client may take to send a request")]
    keepalive_seconds: Annotated[float, Meta(ge=1, le=3600), Setting("SKIP_KEEPALIVE_SECONDS", "api.keepalive_seconds",
        "75", "how long an idle connection is kept")]
    max_connections: Annotated[Count, Setting("SKIP_MAX_CONNECTIONS", "api.max_connections", "20000",
        "connections to one api process; its limit of open files is a bound too")]
    max_batch: Annotated[int, Meta(ge=1, le=4096), Setting("SKIP_MAX_BATCH", "api.max_batch", "256",
        "keys in one commit")]
    max_queue: Annotated[Count, Setting("SKIP_MAX_QUEUE", "api.max_queue", "4096",
        "callers that wait for a commit before others are answered 503; at least SKIP_MAX_BATCH")]
    sync_timeout_seconds: Annotated[Wait, Setting("SKIP_SYNC_TIMEOUT", "sync.timeout_seconds", "2",
        "how long a caller may wait until a key is stored at a peer over the bus")]
    retrieve_wait_seconds: Annotated[float, Meta(ge=0, le=60), Setting("SKIP_RETRIEVE_WAIT",
        "sync.retrieve_wait_seconds", "1",
        "how long a caller may wait for a key that is still on its way over the bus; 0 is not at all")]
    heartbeat_seconds: Annotated[float, Meta(ge=0.1, le=3600), Setting("SKIP_HEARTBEAT_SECONDS",
        "syncer.heartbeat_seconds", "5", "the time between two heartbeats, and between two signs of life of a process")]
    metrics_port: Annotated[int, Meta(ge=0, le=65535), Setting("SKIP_METRICS_PORT", "metrics.port", "0",
        "Prometheus text on 127.0.0.1, on another port for each process of a host; 0 is off")]
    log_level: Annotated[LogLevel, Setting("SKIP_LOG_LEVEL", "log.level", "info",
        "the least that is logged; lines of requests are always logged")]
    config_file: str | None = None
    peers: Mapping[str, PeerSettings] = field(default_factory=dict, hash=False)
    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    service_links: tuple[str, ...] = field(default=(), compare=False)

    def link_of(self, system_id: str) -> Link:
        """How this key provider reaches a peer. A peer without a table of its own is in the same store."""
        peer = self.peers.get(system_id)
        return "store" if peer is None else peer.link

    @property
    def names_broker(self) -> bool:
        """Whether RABBITMQ_URL is set. An api may do without a broker, and then it is not."""
        return self.origins.get("RABBITMQ_URL") != "default"

    @property
    def bus_peers(self) -> tuple[PeerSettings, ...]:
        """The peers that keys travel to over a bus, in the order of the TOML file."""
        return tuple(peer for peer in self.peers.values() if peer.link == "bus")
# fmt: on


@dataclass(frozen=True)
class Option(Setting):
    """A setting with its type and its path in the model, such as `mysql.host`."""

    path: str
    hint: Any

    @property
    def secret(self) -> bool:
        """Whether its value must not be seen."""
        return getattr(self.hint, "__origin__", None) is Secret

    @property
    def file_variable(self) -> str:
        """The variable that names a file with the secret in it."""
        return f"{self.variable}_FILE"

    @property
    def wants(self) -> str:
        """What it accepts, in words."""
        return wants(self.hint, "seconds" if self.path.endswith("_seconds") else "")

    @property
    def fix(self) -> str:
        """What to do about a missing or a wrong value, in a sentence."""
        how = f"Set it, or {self.file_variable}," if self.secret else "Set it"
        or_remove = "" if self.default is None or self.secret else f", or remove it for {self.default}"
        return f"{how} to {self.wants}{or_remove}."


def _options_of(model: type, prefix: str = "") -> Iterator[Option]:
    for name, hint in get_type_hints(model, include_extras=True).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _options_of(hint, f"{prefix}{name}.")
        for note in getattr(hint, "__metadata__", ()):
            if isinstance(note, Setting):
                yield Option(note.variable, note.place, note.default, note.help, prefix + name, hint)


OPTIONS = tuple(_options_of(Settings))
CONFIG_FILE = "SKIP_CONFIG_FILE"
REMOTE_PREFIX = "SKIP_REMOTE_SYSTEM_ID_"
# In the TOML file: a list of ids, a table of patterns, and a list of tables.
REMOTE_PLACE, IDENTITIES_PLACE, PEERS_PLACE = "remote_system_ids", "identities", "peers"
# The earlier server's name, which Compose files of its users still have. SKIP_ENV wins if both are set.
EARLIER_NAMES = {"SKIP_ENV": "FLASK_ENV"}
_REMOTE_NAME = re.compile(REMOTE_PREFIX + r"([1-9][0-9]{0,5})")


def remote_number(name: str) -> int | None:
    """The n of `SKIP_REMOTE_SYSTEM_ID_n`, from 1 and without leading zeros; None for any other name."""
    found = _REMOTE_NAME.fullmatch(name)
    return int(found[1]) if found else None


def known_names() -> tuple[str, ...]:
    """Every variable that means something here, the numbered ones by their first."""
    files = [option.file_variable for option in OPTIONS if option.secret]
    return (*(option.variable for option in OPTIONS), *files, CONFIG_FILE, f"{REMOTE_PREFIX}1")
