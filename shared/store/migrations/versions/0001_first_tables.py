"""The first tables.

Written out in SQL, not taken from ``schema.py``: a migration says what was, the schema what is, and a test
compares the two. Tables are made only where they are missing, because statements that change tables commit one
by one and a process that died half-way must be able to go on.
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_ID = "VARCHAR(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL"
_MS = "BIGINT UNSIGNED NOT NULL"
_ASCII = "CHARACTER SET ascii COLLATE ascii_bin NOT NULL"
_COUNT = "BIGINT UNSIGNED NOT NULL DEFAULT 0"

_TABLES = {
    "key_records": f"""
        target_id {_ID}, expires_ms {_MS}, key_id VARBINARY(64) NOT NULL, source_id {_ID},
        size_bits SMALLINT UNSIGNED NOT NULL, wrapping_key_id BINARY(16) NOT NULL, nonce BINARY(12) NOT NULL,
        sealed VARBINARY(80) NOT NULL, correlation_id VARCHAR(64) {_ASCII},
        PRIMARY KEY (target_id, expires_ms, key_id), UNIQUE KEY key_records_key_id (key_id)""",
    "wrapping_keys": f"""
        wrapping_key_id BINARY(16) NOT NULL, source_id {_ID}, target_id {_ID}, epoch_id BINARY(16) NOT NULL,
        sealed VARBINARY(2048) NOT NULL, signature VARBINARY(5000) NOT NULL, expires_ms {_MS},
        PRIMARY KEY (wrapping_key_id), KEY wrapping_keys_expires (expires_ms)""",
    "announcements": f"""
        system_id {_ID}, digest BINARY(48) NOT NULL, body MEDIUMBLOB NOT NULL, issued_ms {_MS},
        PRIMARY KEY (system_id)""",
    "pinned_identities": f"""
        observer_id {_ID}, subject_id {_ID}, public_key VARBINARY(4096) NOT NULL, pinned_ms {_MS},
        presented_key VARBINARY(4096) NULL, presented_ms BIGINT UNSIGNED NULL,
        PRIMARY KEY (observer_id, subject_id)""",
    "peers": f"""
        local_id {_ID}, peer_id {_ID}, endpoint VARCHAR(255) NOT NULL DEFAULT '',
        last_heartbeat_ms BIGINT UNSIGNED NULL, last_heartbeat_no {_COUNT},
        heartbeat_interval_ms INT UNSIGNED NOT NULL DEFAULT 0,
        issued {_COUNT}, retrieved {_COUNT}, expired {_COUNT},
        inbound_issued {_COUNT}, inbound_retrieved {_COUNT}, inbound_expired {_COUNT},
        PRIMARY KEY (local_id, peer_id)""",
    "outbox": f"""
        id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT, local_id {_ID}, peer_id {_ID}, type VARCHAR(32) {_ASCII},
        payload MEDIUMBLOB NOT NULL, items INT UNSIGNED NOT NULL, token BINARY(16) NULL, created_ms {_MS},
        envelope_no BIGINT UNSIGNED NULL, sent_ms BIGINT UNSIGNED NULL, attempts INT UNSIGNED NOT NULL DEFAULT 0,
        PRIMARY KEY (id), KEY outbox_envelope (local_id, peer_id, envelope_no),
        KEY outbox_unsent (local_id, envelope_no, sent_ms), UNIQUE KEY outbox_token (token),
        KEY outbox_created (local_id, created_ms)""",
    "inbox": f"""
        local_id {_ID}, sender_id {_ID}, envelope_no {_MS}, received_ms {_MS},
        PRIMARY KEY (local_id, sender_id, envelope_no), KEY inbox_received (local_id, received_ms)""",
    "processes": f"""
        local_id {_ID}, role VARCHAR(16) {_ASCII}, instance VARCHAR(128) NOT NULL, seen_ms {_MS},
        detail VARCHAR(255) NOT NULL DEFAULT '',
        PRIMARY KEY (local_id, role, instance)""",
}


def upgrade() -> None:
    for name, columns in _TABLES.items():
        op.execute(
            f"CREATE TABLE IF NOT EXISTS {name} ({columns}) "
            "ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
        )
