"""What a broker is given at its start: one account for each syncer, with the rights of docs/wire.md and no others.

RabbitMQ reads the file at every start, so that an account that is changed here is changed there. It holds salted
hashes of the passwords, as RabbitMQ itself stores them. Pure, but for the salt.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Mapping

from shared.bus_names import encode_id

CONFIGURATION = """\
# Accounts and rights. With them the broker makes no account of its own.
load_definitions = /run/skipbus/definitions.json
# An envelope has 4 MiB at most; a larger message would only fill the memory of whoever is sent it.
max_message_size = 4259840
# Below this much free disk the broker takes no more messages.
disk_free_limit.absolute = 256MB
# Quorum queues reserve their write-ahead log's full size on disk.
raft.wal_max_size_bytes = 67108864
"""


def definitions(syncers: Mapping[str, tuple[str, str]]) -> str:
    """The definitions file for these syncers: system id -> (account, password)."""
    users = [_user(account, password) for account, password in syncers.values()]
    permissions = [_permission(account, system_id) for system_id, (account, _) in syncers.items()]
    return json.dumps({"vhosts": [{"name": "/"}], "users": users, "permissions": permissions}, indent=2) + "\n"


def own_names(system_id: str) -> str:
    """The pattern of what a syncer may configure, write and read."""
    # encode_id leaves only characters that mean nothing in a pattern.
    own = re.escape(encode_id(system_id))
    return rf"^skipbus\.(envelopes|dead|nudges|(kp|live|dead)\.{own}|nudges\.{own}\..*)$"


def _user(account: str, password: str) -> dict[str, object]:
    return {
        "name": account,
        "password_hash": password_hash(password, secrets.token_bytes(4)),
        "hashing_algorithm": "rabbit_password_hashing_sha256",
        "tags": [],
    }


def password_hash(password: str, salt: bytes) -> str:
    """RabbitMQ's form: base64 of salt and SHA-256 over salt and password."""
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def _permission(account: str, system_id: str) -> dict[str, str]:
    names = own_names(system_id)
    return {"user": account, "vhost": "/", "configure": names, "write": names, "read": names}
