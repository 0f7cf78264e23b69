"""Tables and columns of bus links: announcements by observer, stock at both ends, withdrawn keys, more about peers.

Additive only (decision 11): an earlier release goes on with this store. What is there already is passed over,
because statements that change tables commit one by one and a process that died half-way must be able to go on.
"""

from __future__ import annotations

from alembic import op
from sqlalchemy import inspect

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_ID = "VARCHAR(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL"
_MS = "BIGINT UNSIGNED NOT NULL"
_COUNT = "BIGINT UNSIGNED NOT NULL DEFAULT 0"

_TABLES = {
    "bus_announcements": f"""
        local_id {_ID}, system_id {_ID}, digest BINARY(48) NOT NULL, body MEDIUMBLOB NOT NULL, issued_ms {_MS},
        PRIMARY KEY (local_id, system_id)""",
    "stock": f"""
        local_id {_ID}, peer_id {_ID}, expires_ms {_MS}, key_id VARBINARY(64) NOT NULL,
        size_bits SMALLINT UNSIGNED NOT NULL, wrapping_key_id BINARY(16) NOT NULL, nonce BINARY(12) NOT NULL,
        sealed VARBINARY(80) NOT NULL, token BINARY(16) NOT NULL, placed_ms BIGINT UNSIGNED NULL,
        PRIMARY KEY (local_id, peer_id, expires_ms, key_id), UNIQUE KEY stock_key_id (key_id),
        KEY stock_token (token)""",
    "stock_held": f"""
        local_id {_ID}, source_id {_ID}, key_id VARBINARY(64) NOT NULL, expires_ms {_MS},
        PRIMARY KEY (local_id, source_id, key_id), KEY stock_held_expires (local_id, expires_ms)""",
    "withdrawn_keys": f"""
        local_id {_ID}, source_id {_ID}, key_id VARBINARY(64) NOT NULL, expires_ms {_MS},
        PRIMARY KEY (local_id, source_id, key_id), KEY withdrawn_keys_expires (local_id, expires_ms)""",
}

_PEER_COLUMNS = {
    "clock_skew_ms": "INT NULL",
    "last_refusal": "VARCHAR(255) NOT NULL DEFAULT ''",
    "last_refusal_ms": "BIGINT UNSIGNED NULL",
    "withdrawn": _COUNT,
    "inbound_withdrawn": _COUNT,
}


def upgrade() -> None:
    for name, columns in _TABLES.items():
        op.execute(
            f"CREATE TABLE IF NOT EXISTS {name} ({columns}) "
            "ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
        )
    # MySQL, unlike MariaDB, knows no ADD COLUMN IF NOT EXISTS; the migration lock keeps others out meanwhile.
    there = {column["name"] for column in inspect(op.get_bind()).get_columns("peers")}
    missing = [f"ADD COLUMN {name} {kind}" for name, kind in _PEER_COLUMNS.items() if name not in there]
    if missing:
        op.execute(f"ALTER TABLE peers {', '.join(missing)}")
