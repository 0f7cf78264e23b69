"""The tables of the store, as SQLAlchemy Core sees them. Migrations make them; this module describes them.

Rules: ids are ``utf8mb4_bin`` (case-sensitive, compared byte by byte), key material is only ever
ciphertext, times are UTC milliseconds since the Unix epoch in BIGINT, and every query of
``skipbus.shared.store`` has an index here. Several KPs may share one store, so every table that belongs to a
KP carries its system id in front.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, Index, MetaData, Table
from sqlalchemy.dialects import mysql

METADATA = MetaData()
_TABLE: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}


def _id(name: str, **options: object) -> Column[str]:
    kind = mysql.VARCHAR(64, charset="utf8mb4", collation="utf8mb4_bin")
    return Column(name, kind, nullable=False, **options)  # type: ignore[arg-type]


def _ms(name: str, nullable: bool = False) -> Column[int]:
    return Column(name, mysql.BIGINT(unsigned=True), nullable=nullable)


def _counter(name: str) -> Column[int]:
    return Column(name, mysql.BIGINT(unsigned=True), nullable=False, server_default="0")


# Clustered by target and expiry: new keys go to the end of their target's range, and expired ones
# leave from its beginning, so neither costs more with more live keys. keyIds are unique in a store.
KEY_RECORDS = Table(
    "key_records",
    METADATA,
    _id("target_id", primary_key=True),
    Column("expires_ms", mysql.BIGINT(unsigned=True), primary_key=True, autoincrement=False),
    Column("key_id", mysql.VARBINARY(64), primary_key=True),
    _id("source_id"),
    Column("size_bits", mysql.SMALLINT(unsigned=True), nullable=False),
    Column("wrapping_key_id", mysql.BINARY(16), nullable=False),
    Column("nonce", mysql.BINARY(12), nullable=False),
    Column("sealed", mysql.VARBINARY(80), nullable=False),
    Column("correlation_id", mysql.VARCHAR(64, charset="ascii", collation="ascii_bin"), nullable=False),
    Index("key_records_key_id", "key_id", unique=True),
    **_TABLE,
)

WRAPPING_KEYS = Table(
    "wrapping_keys",
    METADATA,
    Column("wrapping_key_id", mysql.BINARY(16), primary_key=True),
    _id("source_id"),
    _id("target_id"),
    Column("epoch_id", mysql.BINARY(16), nullable=False),
    Column("sealed", mysql.VARBINARY(2048), nullable=False),
    Column("signature", mysql.VARBINARY(5000), nullable=False),
    _ms("expires_ms"),
    Index("wrapping_keys_expires", "expires_ms"),
    **_TABLE,
)

ANNOUNCEMENTS = Table(
    "announcements",
    METADATA,
    _id("system_id", primary_key=True),
    Column("digest", mysql.BINARY(48), nullable=False),
    Column("body", mysql.MEDIUMBLOB, nullable=False),
    _ms("issued_ms"),
    **_TABLE,
)

# What one KP believes about another's identity: learned once, then only an operator changes it.
PINNED_IDENTITIES = Table(
    "pinned_identities",
    METADATA,
    _id("observer_id", primary_key=True),
    _id("subject_id", primary_key=True),
    Column("public_key", mysql.VARBINARY(4096), nullable=False),
    _ms("pinned_ms"),
    Column("presented_key", mysql.VARBINARY(4096), nullable=True),
    _ms("presented_ms", nullable=True),
    **_TABLE,
)

# Announcements of bus peers, each as local_id got it: another KP of the same store must not take one for that of a
# KP which reads this store, and seal keys to a KP that would never see them.
BUS_ANNOUNCEMENTS = Table(
    "bus_announcements",
    METADATA,
    _id("local_id", primary_key=True),
    _id("system_id", primary_key=True),
    Column("digest", mysql.BINARY(48), nullable=False),
    Column("body", mysql.MEDIUMBLOB, nullable=False),
    _ms("issued_ms"),
    **_TABLE,
)

# Seen from local_id. issued/retrieved/expired/withdrawn: keys that local_id made for the peer;
# inbound_*: keys that the peer made for local_id. clock_skew_ms: by how much the peer's clock is behind this one,
# negative where it is ahead. last_refusal: why the peer refused an envelope of local_id's.
# The row whose peer_id is empty has in last_heartbeat_no up to which number local_id's own envelopes may be numbered.
PEERS = Table(
    "peers",
    METADATA,
    _id("local_id", primary_key=True),
    _id("peer_id", primary_key=True),
    Column("endpoint", mysql.VARCHAR(255), nullable=False, server_default=""),
    _ms("last_heartbeat_ms", nullable=True),
    Column("last_heartbeat_no", mysql.BIGINT(unsigned=True), nullable=False, server_default="0"),
    Column("heartbeat_interval_ms", mysql.INTEGER(unsigned=True), nullable=False, server_default="0"),
    _counter("issued"),
    _counter("retrieved"),
    _counter("expired"),
    _counter("inbound_issued"),
    _counter("inbound_retrieved"),
    _counter("inbound_expired"),
    Column("clock_skew_ms", mysql.INTEGER(), nullable=True),
    Column("last_refusal", mysql.VARCHAR(255), nullable=False, server_default=""),
    _ms("last_refusal_ms", nullable=True),
    _counter("withdrawn"),
    _counter("inbound_withdrawn"),
    **_TABLE,
)

# Events wait here until the peer has acknowledged them. ``envelope_no`` is null until the syncer has
# put the row into an envelope; rows of one envelope share the number, which never changes after that.
# ``token`` lets the writer find out whether a commit happened when its connection broke during the commit.
OUTBOX = Table(
    "outbox",
    METADATA,
    Column("id", mysql.BIGINT(unsigned=True), primary_key=True, autoincrement=True),
    _id("local_id"),
    _id("peer_id"),
    Column("type", mysql.VARCHAR(32, charset="ascii", collation="ascii_bin"), nullable=False),
    Column("payload", mysql.MEDIUMBLOB, nullable=False),
    Column("items", mysql.INTEGER(unsigned=True), nullable=False),
    Column("token", mysql.BINARY(16), nullable=True),
    _ms("created_ms"),
    Column("envelope_no", mysql.BIGINT(unsigned=True), nullable=True),
    _ms("sent_ms", nullable=True),
    Column("attempts", mysql.INTEGER(unsigned=True), nullable=False, server_default="0"),
    Index("outbox_envelope", "local_id", "peer_id", "envelope_no"),
    Index("outbox_unsent", "local_id", "envelope_no", "sent_ms"),
    Index("outbox_token", "token", unique=True),
    Index("outbox_created", "local_id", "created_ms"),
    **_TABLE,
)

# Envelopes already handled: the same transaction that has their effect writes them here.
INBOX = Table(
    "inbox",
    METADATA,
    _id("local_id", primary_key=True),
    _id("sender_id", primary_key=True),
    Column("envelope_no", mysql.BIGINT(unsigned=True), primary_key=True, autoincrement=False),
    _ms("received_ms"),
    Index("inbox_received", "local_id", "received_ms"),
    **_TABLE,
)

# Keys that local_id has placed at peer_id ahead of need: its own copy of each, sealed to itself. ``placed_ms`` is null
# until the peer has acknowledged the outbox row of that token. Clustered so that the oldest of a peer come first.
STOCK = Table(
    "stock",
    METADATA,
    _id("local_id", primary_key=True),
    _id("peer_id", primary_key=True),
    Column("expires_ms", mysql.BIGINT(unsigned=True), primary_key=True, autoincrement=False),
    Column("key_id", mysql.VARBINARY(64), primary_key=True),
    Column("size_bits", mysql.SMALLINT(unsigned=True), nullable=False),
    Column("wrapping_key_id", mysql.BINARY(16), nullable=False),
    Column("nonce", mysql.BINARY(12), nullable=False),
    Column("sealed", mysql.VARBINARY(80), nullable=False),
    Column("token", mysql.BINARY(16), nullable=False),
    _ms("placed_ms", nullable=True),
    Index("stock_key_id", "key_id", unique=True),
    Index("stock_token", "token"),
    **_TABLE,
)

# Which of the key records at local_id are source_id's stock: not given out there yet, so not counted as issued.
STOCK_HELD = Table(
    "stock_held",
    METADATA,
    _id("local_id", primary_key=True),
    _id("source_id", primary_key=True),
    Column("key_id", mysql.VARBINARY(64), primary_key=True),
    _ms("expires_ms"),
    Index("stock_held_expires", "local_id", "expires_ms"),
    **_TABLE,
)

# keyIds that their source took back: a record that comes after its withdrawal must never be stored.
WITHDRAWN_KEYS = Table(
    "withdrawn_keys",
    METADATA,
    _id("local_id", primary_key=True),
    _id("source_id", primary_key=True),
    Column("key_id", mysql.VARBINARY(64), primary_key=True),
    _ms("expires_ms"),
    Index("withdrawn_keys_expires", "local_id", "expires_ms"),
    **_TABLE,
)

# Signs of life of a KP's own processes, for /health and for the operator.
PROCESSES = Table(
    "processes",
    METADATA,
    _id("local_id", primary_key=True),
    Column("role", mysql.VARCHAR(16, charset="ascii", collation="ascii_bin"), primary_key=True),
    Column("instance", mysql.VARCHAR(128), primary_key=True),
    _ms("seen_ms"),
    Column("detail", mysql.VARCHAR(255), nullable=False, server_default=""),
    **_TABLE,
)

# What only one of several processes does, and which one does it; see ``election``.
LEASES = Table(
    "leases",
    METADATA,
    Column("name", mysql.VARCHAR(128, charset="utf8mb4", collation="utf8mb4_bin"), primary_key=True),
    Column("holder", mysql.VARCHAR(128, charset="ascii", collation="ascii_bin"), nullable=False),
    Column("renewals", mysql.BIGINT(unsigned=True), nullable=False),
    **_TABLE,
)
