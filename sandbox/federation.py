"""What joins the brokers of several sites: definitions made from the template that operators are given.

Owns the putting in of accounts, virtual hosts and upstreams. The template (`compose/rabbitmq/definitions.json`) owns
what is federated and how.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from skipbus.ctl.broker_definitions import fill_template, password_hash

FEDERATION_USER = "federation"
PLUGINS = "rabbitmq_federation"
# How soon a line that went silent is noticed, and how long a broker waits for one that does not answer.
HEARTBEAT_SECONDS = 5
CONNECT_MS = 5000

_TEMPLATE = Path(__file__).resolve().parent.parent / "compose" / "rabbitmq" / "definitions.json"


@dataclass(frozen=True)
class Upstream:
    """Another site's broker, as it is reached from here. The URI holds a password and stays out of the repr."""

    name: str
    uri: str = field(repr=False)


@dataclass(frozen=True)
class Account:
    """A user of a broker."""

    name: str
    password: str = field(repr=False)


def upstream_uri(password: str, host: str, port: int, vhost: str = "/") -> str:
    """The URI by which another broker fetches from the one at `host:port`."""
    query = f"heartbeat={HEARTBEAT_SECONDS}&connection_timeout={CONNECT_MS}"
    return f"amqp://{FEDERATION_USER}:{password}@{host}:{port}/{quote(vhost, safe='')}?{query}"


def definitions(user: Account, federation_password: str, upstreams: Mapping[str, Sequence[Upstream]]) -> str:
    """The definitions of a broker whose virtual hosts have these upstreams, as JSON."""
    accounts = {
        "USER": user.name,
        "PASSWORD_HASH": password_hash(user.password, secrets.token_bytes(4)),
        # Any number of key providers, and the tests, use this one account.
        "USER_RIGHTS": ".*",
        "FEDERATION_USER": FEDERATION_USER,
        # One account for all of them.
        "DOWNSTREAM": ".*",
        "FEDERATION_PASSWORD_HASH": password_hash(federation_password, secrets.token_bytes(4)),
    }
    template: dict[str, list[Any]] = json.loads(_TEMPLATE.read_text())
    filled = {
        part: [fill_template(entry, **accounts, **places) for entry in entries for places in _places(entry, upstreams)]
        for part, entries in template.items()
    }
    return json.dumps(filled, indent=2)


def _places(entry: object, upstreams: Mapping[str, Sequence[Upstream]]) -> Iterator[dict[str, str]]:
    """How often an entry of the template stands in the definitions, and with what each time."""
    text = json.dumps(entry)
    if "${VHOST}" not in text:
        yield {}
    elif "${UPSTREAM}" not in text:
        yield from ({"VHOST": vhost} for vhost in upstreams)
    else:
        for vhost, others in upstreams.items():
            yield from ({"VHOST": vhost, "UPSTREAM": other.name, "UPSTREAM_URI": other.uri} for other in others)
