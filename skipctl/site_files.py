"""The files that ``skipctl site init`` and ``pair`` write into a new folder for Compose.

Every password is random and in a file of its own. No container mounts the authorities' private keys or the clients'
files.
"""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from skipbus.ctl.broker_definitions import SiteDefinitions, configuration, definitions, site_configuration
from skipbus.ctl.cert import make_broker_certificate, make_certificates
from skipbus.ctl.shipped import read_shipped
from skipbus.ctl.site_folder import NEW_KEYRING, SHARED_PLACES, SITE_PLACE, write_new
from skipbus.ctl.site_link import SiteFolder
from skipbus.shared.crypto.identity import fingerprint
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.settings.peers import identity_line

_SERVICES = ("api", "syncer", "janitor")
_FIRST_PORT = 8443
_PORT_STEP = 1000
# Beside the api's own TLS port, in the network that they share.
_STUNNEL_PORT = 9443
_LIFETIMES = ("# Seconds; alike at all key providers.", "KEY_TTL_SECONDS=3600", "EPOCH_SECONDS=600")


def make_shared_store(folder: Path, ids: list[str], hosts: list[str]) -> None:
    """Two key providers over one store."""
    syncers = _make_common(folder, SHARED_PLACES, ids, hosts)
    write_new(folder / "rabbitmq" / "rabbitmq.conf", configuration(), 0o444)
    write_new(folder / "rabbitmq" / "definitions.json", definitions(syncers), 0o444)
    stunnel = read_shipped("stunnel/stunnel.conf").replace("accept = 8443", f"accept = {_STUNNEL_PORT}")
    write_new(folder / "stunnel.conf", stunnel, 0o444)
    write_new(folder / "compose.yaml", read_shipped("shared-store.yaml"))
    write_new(folder / "two-apis.yaml", read_shipped("two-apis.yaml"))
    write_new(folder / "haproxy.cfg", read_shipped("haproxy.cfg"), 0o444)
    write_new(folder / ".env", _shared_environment(folder, ids))


def make_site(
    folder: Path, system_id: str, peers: list[str], hosts: list[str], broker: tuple[str, int], first: bool | None = None
) -> None:
    """A site that is not joined yet. ``first`` says which of two sites on one host it is, or None."""
    ((account, password),) = _make_common(folder, (SITE_PLACE,), [system_id], hosts).values()
    made = folder / "rabbitmq" / "broker"
    for name in ("rabbitmq/broker/authorities", "config", "handover"):
        (folder / name).mkdir(parents=True)
    # Containers mount the folder, so that a file in it can be replaced while they run.
    for name in ("rabbitmq/broker", "rabbitmq/broker/authorities", "config"):
        (folder / name).chmod(0o755)
    make_broker_certificate(folder / "authorities" / "broker", made, broker[0])
    shutil.copy(folder / "authorities" / "broker" / "ca.pem", made / "authorities.pem")
    for name in ("broker.key", "broker.pem", "authorities.pem"):
        (made / name).chmod(0o444)
    write_new(made / "rabbitmq.conf", site_configuration(system_id), 0o444)
    write_new(made / "definitions.json", SiteDefinitions.make(system_id, account, password).text(), 0o444)
    write_new(made / "enabled_plugins", "[rabbitmq_federation].\n", 0o444)
    write_new(folder / "config" / "skipbus.toml", _toml(peers), 0o444)
    identity = Keyring.create(folder / NEW_KEYRING, system_id).identity.public_key
    head = f"# {system_id} has the identity {fingerprint(identity)}\n"
    write_new(folder / "identity", f"{head}{identity_line(identity)}\n", 0o444)
    write_new(folder / "compose.yaml", read_shipped("site.yaml"))
    write_new(folder / "haproxy.cfg", read_shipped("haproxy.cfg"), 0o444)
    write_new(folder / ".env", _site_environment(folder, system_id, broker, first))
    if first is not None:
        write_new(folder / "compose.override.yaml", read_shipped("two-sites.yaml"))
    for peer in peers:
        SiteFolder(folder).invite(peer)


def _make_common(folder: Path, places: tuple[str, ...], ids: list[str], hosts: list[str]) -> dict[str, tuple[str, str]]:
    """Makes what both kinds of folder have; returns the syncers' accounts at the broker, by system id."""
    for name in ("secrets", "rabbitmq", "clients", "authorities"):
        (folder / name).mkdir()
    syncers = {}
    for place, system_id in zip(places, ids, strict=True):
        password = secrets.token_hex(24)
        syncers[system_id] = (f"{place}_syncer", password)
        _write_accounts(folder / "secrets", place, password)
        _write_tls(folder, place, system_id, hosts)
    password = secrets.token_hex(24)
    write_new(folder / "secrets" / "mysql_admin_password", password)
    write_new(folder / "secrets" / "mysql_root_password", password, 0o444)
    return syncers


def _write_accounts(folder: Path, place: str, broker_password: str) -> None:
    for role in _SERVICES:
        write_new(folder / f"{place}_{role}_mysql_password", secrets.token_hex(24))
    write_new(folder / f"{place}_syncer_rabbitmq_url", f"amqp://{place}_syncer:{broker_password}@rabbitmq:5672/")


def _write_tls(folder: Path, place: str, system_id: str, hosts: list[str]) -> None:
    """An authority for one key provider, the certificates of its api, and those of a client."""
    authority, served, client = folder / "authorities" / place, folder / place / "tls", folder / "clients" / place
    make_certificates(authority, f"skipbus {place}", hosts, ["client"])
    for target in (served, client):
        target.mkdir(parents=True)
        shutil.copy(authority / "ca.pem", target)
    for name in ("rsa.pem", "rsa.key", "ecdsa.pem", "ecdsa.key"):
        (authority / name).rename(served / name)
    for name in ("client.pem", "client.key"):
        (authority / name).rename(client / name)
    line = f"router-at-{place}:{secrets.token_hex(32)}\n"
    write_new(served / "psk.txt", line)
    write_new(client / "psk.txt", line)
    write_new(client / "system_id", f"{system_id}\n")


def _toml(peers: list[str]) -> str:
    listed = ", ".join(f'"{peer}"' for peer in peers)
    return f"# Settings of all services of this site, in addition to their variables.\nremote_system_ids = [{listed}]\n"


def _site_environment(folder: Path, system_id: str, broker: tuple[str, int], first: bool | None) -> str:
    second = first is False
    return _lines(
        *_head(folder),
        "# HAProxy keeps the port while the apis are replaced.",
        "FRONT_IMAGE=haproxy:3.0",
        f"SYSTEM_ID='{system_id}'",
        f"SITE_PORT={_FIRST_PORT + second * _PORT_STEP}",
        "# Where other sites reach the broker; its certificate is for this name.",
        f"BROKER_HOST={broker[0]}",
        f"BROKER_PORT={broker[1]}",
        *_link_environment(first),
        *_LIFETIMES,
    )


def _link_environment(first: bool | None) -> list[str]:
    if first is None:
        return []
    external = "false" if first else "true"
    return ["# The first of two sites on one host makes the network that joins them.", f"LINK_EXTERNAL={external}"]


def _shared_environment(folder: Path, ids: list[str]) -> str:
    lines = [
        *_head(folder),
        "# For two-apis.yaml: copy that to compose.override.yaml for two apis behind HAProxy at each key provider.",
        "FRONT_IMAGE=haproxy:3.0",
        "# 8443 leads to the api's own TLS; 9443, with COMPOSE_PROFILES=stunnel, to stunnel.",
        "TLS_TARGET=8443",
    ]
    for number, (place, system_id) in enumerate(zip(SHARED_PLACES, ids, strict=True)):
        lines += [f"{place.upper()}_ID='{system_id}'", f"{place.upper()}_PORT={_FIRST_PORT + number * _PORT_STEP}"]
    return _lines(*lines, *_LIFETIMES)


def _head(folder: Path) -> list[str]:
    return [
        "# Read by Compose from this folder. Every name here is used in compose.yaml.",
        f"COMPOSE_PROJECT_NAME={project_name(folder)}",
        "SKIPBUS_IMAGE=skipbus:latest",
        "# Where ports are published.",
        "ADDRESS=0.0.0.0",
    ]


def _lines(*lines: str) -> str:
    return "\n".join(lines) + "\n"


def project_name(folder: Path) -> str:
    plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in folder.resolve().name.lower())
    return f"skipbus-{plain.strip('-') or 'site'}"
