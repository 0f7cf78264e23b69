"""What a broker loads at its start: one account for each syncer, with the rights of docs/protocol.md and no others; for
a site, one account and one upstream for each other site.

RabbitMQ reads the file at every start, so that an account that is changed here is changed there. It holds salted
hashes of the passwords, as RabbitMQ itself stores them; an upstream's password stands in its URI, because the broker
has to say it. Pure, but for the salt.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from string import Template
from typing import Any
from urllib.parse import quote, urlencode

from skipbus.ctl.shipped import read_shipped
from skipbus.shared.broker.names import encode_id

# Where a site's broker finds its files; Compose mounts them there.
BROKER_FILES = "/run/skipbus"

_SITE_CONFIGURATION = f"""\
# Sites tell each other's brokers apart by this name: with one name for two, messages would count as sent back.
cluster_name = ${{CLUSTER}}
# Where other sites' brokers fetch. Both ends show a certificate.
listeners.ssl.default = 5671
ssl_options.cacertfile = {BROKER_FILES}/authorities.pem
ssl_options.certfile = {BROKER_FILES}/broker.pem
ssl_options.keyfile = {BROKER_FILES}/broker.key
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
ssl_options.versions.1 = tlsv1.3
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
    return rf"^skipbus\.(envelopes|dead|notifications|(kp|live|dead)\.{own}|notifications\.{own}\..*)$"


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


class SiteDefinitions:
    """The definitions of one site's broker, which grow by an account and an upstream for each other site.

    What is federated, and what another site's account may do, stands in ``compose/rabbitmq/definitions.json``.
    """

    def __init__(self, text: str) -> None:
        self._parts: dict[str, list[dict[str, Any]]] = json.loads(text)
        self._template: dict[str, list[dict[str, Any]]] = json.loads(read_shipped("rabbitmq/definitions.json"))

    @classmethod
    def make(cls, system_id: str, account: str, password: str) -> SiteDefinitions:
        """Those of a site that knows no other one yet."""
        made = cls(definitions({system_id: (account, password)}))
        for part in ("exchanges", "policies"):
            made._parts[part] = [fill_template(entry, VHOST="/") for entry in made._template[part]]
        made._parts["parameters"] = []
        return made

    def admit(self, peer_id: str, account: str, password: str) -> None:
        """The account by which the broker of ``peer_id`` fetches here, with a new password where it was there."""
        names = fill_template(
            self._template["permissions"][1],
            FEDERATION_USER=account,
            VHOST="/",
            # Its own queue and exchange, which RabbitMQ names after its cluster, and no other site's.
            DOWNSTREAM=rf"{re.escape(encode_id(peer_id))}( [AB])?",
        )
        self._put("users", "name", _user(account, password))
        self._put("permissions", "user", names)

    def fetch_from(self, peer_id: str, uri: str) -> None:
        """The upstream by which this broker fetches from the one of ``peer_id``."""
        (upstream,) = self._template["parameters"]
        self._put(
            "parameters", "name", fill_template(upstream, VHOST="/", UPSTREAM=encode_id(peer_id), UPSTREAM_URI=uri)
        )

    def text(self) -> str:
        """The file."""
        return json.dumps(self._parts, indent=2) + "\n"

    def _put(self, part: str, key: str, entry: dict[str, Any]) -> None:
        self._parts[part] = [other for other in self._parts[part] if other[key] != entry[key]] + [entry]


def configuration() -> str:
    """The configuration of a broker that only its own key providers use."""
    return read_shipped("rabbitmq/rabbitmq.conf")


def site_configuration(system_id: str) -> str:
    """The configuration of a broker that others fetch from, by TLS alone, each with a certificate of its own."""
    return configuration() + Template(_SITE_CONFIGURATION).substitute(CLUSTER=encode_id(system_id))


def upstream_uri(account: str, password: str, host: str, port: int, authority: str) -> str:
    """The URI by which a broker fetches from another site's; ``authority`` is the file that vouches for that one."""
    query = {
        "cacertfile": authority,
        "certfile": f"{BROKER_FILES}/broker.pem",
        "keyfile": f"{BROKER_FILES}/broker.key",
        "verify": "verify_peer",
        "server_name_indication": host,
        # How soon a line that went silent is noticed, and how long a broker waits for one that does not answer.
        "heartbeat": "5",
        "connection_timeout": "5000",
    }
    return f"amqps://{quote(account, safe='')}:{password}@{host}:{port}/%2f?{urlencode(query)}"


def fill_template(value: Any, **places: str) -> Any:  # noqa: ANN401 -- any JSON
    """A part of ``compose/rabbitmq/definitions.json`` with its places filled."""
    if isinstance(value, dict):
        return {name: fill_template(inner, **places) for name, inner in value.items()}
    # Other dollar signs (the ends of patterns) stay as they are.
    return Template(value).safe_substitute(places) if isinstance(value, str) else value
