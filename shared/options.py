"""Owns the list of options: each one's variable, place in the TOML file, kind and default.

Rules: one entry an option and nothing about it elsewhere; names of the earlier server keep their meaning;
a secret has no place in the TOML file, and may be given by a file that `<variable>_FILE` names.
Leaves to others: where values come from (`skipbus.shared.config_sources`), and the frozen result
(`skipbus.shared.config`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from skipbus.shared.option_kinds import (
    NO_FILE,
    Kind,
    account_name,
    amqp_url,
    choice,
    database_name,
    files,
    folder,
    host,
    number,
    password,
    whole,
    yes_no,
)
from skipbus.shared.protocol.system_ids import validate_system_id


@dataclass(frozen=True)
class Option:
    """One option. `default` is text as a variable would hold it; None means that the option is required."""

    name: str
    field: str
    place: str
    kind: Kind
    default: str | None
    help: str
    secret: bool = False

    @property
    def file_name(self) -> str:
        """The variable that names a file with the secret in it."""
        return f"{self.name}_FILE"

    @property
    def fix(self) -> str:
        """What to do about a missing or a bad value, in a sentence."""
        how = f"Set it, or {self.file_name}," if self.secret else "Set it"
        or_remove = "" if self.default is None or self.secret else f", or remove it for {self.default}"
        return f"{how} to {self.kind.wants}{or_remove}."


PORT = whole(1, 65535)
SECONDS = "seconds"
WAIT = number(0.1, 300, SECONDS)
KEEPALIVE = number(1, 3600, SECONDS)
HEARTBEAT = number(0.1, 3600, SECONDS)
LOCAL_ID = Kind("an id of 1 to 64 printable ASCII characters such as KP_Alice", validate_system_id)

# A row reads as two lines: what it is called and what it may be; then what it means.
# fmt: off
OPTIONS: tuple[Option, ...] = (
    Option("SKIP_ENV", "environment", "environment", choice("development", "production"), "production",
           "production writes JSON log lines, development readable ones; FLASK_ENV is read in its absence"),
    Option("SKIP_DEBUG", "debug", "debug", yes_no(), "false",
           "true means log level debug"),
    Option("SKIP_LOCAL_SYSTEM_ID", "local_system_id", "local_system_id", LOCAL_ID, None,
           "this key provider's own id"),
    Option("MYSQL_HOST", "mysql.host", "mysql.host", host(), "127.0.0.1",
           "the store's host"),
    Option("MYSQL_PORT", "mysql.port", "mysql.port", PORT, "3306",
           "the store's port"),
    Option("MYSQL_USER", "mysql.user", "mysql.user", account_name(), None,
           "this process's account at the store"),
    Option("MYSQL_PASSWORD", "mysql.password", "mysql.password", password(), None,
           "the account's password", secret=True),
    Option("MYSQL_DATABASE", "mysql.database", "mysql.database", database_name(), None,
           "the store's database"),
    Option("RABBITMQ_URL", "rabbitmq_url", "rabbitmq.url", amqp_url(), "amqp://guest:guest@127.0.0.1:5672/",
           "the bus, with this process's account", secret=True),
    Option("SKIP_KEYRING_DIR", "keyring_dir", "keyring.dir", folder(), "/var/lib/skipbus/keyring",
           "the folder of this key provider's private keys"),
    Option("SKIP_KEY_TTL_SECONDS", "key_ttl_seconds", "keys.ttl_seconds", whole(1, 604_800, SECONDS), "3600",
           "how long a key lives"),
    Option("SKIP_EPOCH_SECONDS", "epoch_seconds", "keys.epoch_seconds", whole(2, 86_400, SECONDS), "600",
           "how long a key provider seals to one key pair"),
    Option("SKIP_HOST", "host", "api.host", host(), "127.0.0.1",
           "the address that the api listens on"),
    Option("SKIP_PORT", "port", "api.port", PORT, "8080",
           "the port that the api listens on"),
    Option("SKIP_ALLOW_PLAINTEXT", "allow_plaintext", "api.allow_plaintext", yes_no(), "false",
           "true serves SKIP_PORT, without TLS, on SKIP_HOST too where that is not this host alone"),
    Option("SKIP_TLS_PORT", "tls.port", "tls.port", PORT, "8443",
           "the port for TLS, served once there is a certificate or a file of pre-shared keys"),
    Option("SKIP_TLS_CERT_FILE", "tls.cert_files", "tls.cert_file", files(2), NO_FILE,
           "certificate chain in PEM; two with a comma between them, RSA and ECDSA"),
    Option("SKIP_TLS_KEY_FILE", "tls.key_files", "tls.key_file", files(2), NO_FILE,
           "the private key of each certificate chain, in PEM, in the same order"),
    Option("SKIP_TLS_CLIENT_CA_FILE", "tls.client_ca_files", "tls.client_ca_file", files(1), NO_FILE,
           "authorities in PEM; a client without a pre-shared key must then have a certificate from one of them"),
    Option("SKIP_TLS_PSK_FILE", "tls.psk_files", "tls.psk_file", files(1), NO_FILE,
           "pre-shared keys, a line of identity:hex each, as stunnel reads them"),
    Option("SKIP_TLS_HANDSHAKE_TIMEOUT_SECONDS", "tls.handshake_timeout_seconds", "tls.handshake_timeout_seconds",
           WAIT, "10", "how long a client may take for a TLS handshake"),
    Option("SKIP_MAX_CONNECTIONS_PER_ADDRESS", "tls.max_connections_per_address", "tls.max_connections_per_address",
           whole(1, 1_000_000), "1000", "TLS connections of one client address to one api process at a time"),
    Option("SKIP_API_WORKERS", "api_workers", "api.workers", whole(1, 64), "1",
           "api processes that share the port"),
    Option("SKIP_REQUEST_TIMEOUT_SECONDS", "request_timeout_seconds", "api.request_timeout_seconds", WAIT,
           "5", "how long a caller may wait for the store"),
    Option("SKIP_HEADER_TIMEOUT_SECONDS", "header_timeout_seconds", "api.header_timeout_seconds", WAIT,
           "10", "how long a client may take to send a request"),
    Option("SKIP_KEEPALIVE_SECONDS", "keepalive_seconds", "api.keepalive_seconds", KEEPALIVE, "75",
           "how long an idle connection is kept"),
    Option("SKIP_MAX_CONNECTIONS", "max_connections", "api.max_connections", whole(1, 1_000_000), "20000",
           "connections to one api process at a time"),
    Option("SKIP_MAX_BATCH", "max_batch", "api.max_batch", whole(1, 4096), "256",
           "keys in one commit"),
    Option("SKIP_MAX_QUEUE", "max_queue", "api.max_queue", whole(1, 1_000_000), "4096",
           "callers that wait for a commit, before others are answered 503"),
    Option("SKIP_SYNC_TIMEOUT", "sync_timeout_seconds", "sync.timeout_seconds", WAIT, "2",
           "how long a caller may wait until a key is stored at a peer over the bus"),
    Option("SKIP_RETRIEVE_WAIT", "retrieve_wait_seconds", "sync.retrieve_wait_seconds", number(0, 60, SECONDS), "1",
           "how long a caller may wait for a key that has not come over the bus yet; 0 is not at all"),
    Option("SKIP_HEARTBEAT_SECONDS", "heartbeat_seconds", "syncer.heartbeat_seconds", HEARTBEAT, "5",
           "the time between two heartbeats to the peers"),
    Option("SKIP_METRICS_PORT", "metrics_port", "metrics.port", whole(0, 65535), "0",
           "Prometheus text, on a port for each process; 0 is off"),
    Option("SKIP_LOG_LEVEL", "log_level", "log.level", choice("debug", "info", "warning", "error"), "info",
           "the least that is logged"),
)
# fmt: on

CONFIG_FILE = "SKIP_CONFIG_FILE"
REMOTE_PREFIX = "SKIP_REMOTE_SYSTEM_ID_"
REMOTE_PLACE = "remote_system_ids"
# A table: a pattern of identities, and the ids or globs of ids that they may ask for.
IDENTITIES_PLACE = "identities"
# A list of tables, one a peer (`skipbus.shared.peers_config`).
PEERS_PLACE = "peers"
# The earlier server's name, which Compose files of its users still carry. SKIP_ENV wins where both are there.
EARLIER_NAMES = {"SKIP_ENV": "FLASK_ENV"}

_REMOTE_NAME = re.compile(r"SKIP_REMOTE_SYSTEM_ID_([1-9][0-9]{0,5})")


def remote_number(name: str) -> int | None:
    """The n of `SKIP_REMOTE_SYSTEM_ID_n`, from 1 and without leading zeros; None for any other name."""
    found = _REMOTE_NAME.fullmatch(name)
    return int(found[1]) if found else None


def known_names() -> tuple[str, ...]:
    """Every variable that means something here, the numbered ones by their first."""
    files = [option.file_name for option in OPTIONS if option.secret]
    return (*(option.name for option in OPTIONS), *files, CONFIG_FILE, f"{REMOTE_PREFIX}1")
