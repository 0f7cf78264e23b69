"""``skipctl site init|invite|join|pair``: folders for Compose, with `.env`, secrets, certificates and definitions.

Owns the commands and the list of files. ``init`` never overwrites: the folder must be new or empty. Every password is
random and in a file of its own. No container mounts the authorities' private keys or the clients' files.
``skipctl/site_folder.py`` sets owners and modes, ``skipctl/site_link.py`` joins two sites.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from skipbus.ctl.broker_definitions import SiteDefinitions, configuration, definitions, site_configuration
from skipbus.ctl.cert import make_broker_certificate, make_certificates
from skipbus.ctl.command import Commands, add_command, add_group
from skipbus.ctl.handover import parse_broker, read_handover
from skipbus.ctl.shipped import read_shipped
from skipbus.ctl.site_folder import (
    NEW_KEYRING,
    SHARED_PLACES,
    SITE_PLACE,
    check_new,
    give,
    owners_of,
    write_new,
)
from skipbus.ctl.site_link import SiteFolder
from skipbus.shared.crypto.identity import fingerprint
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.errors import OperatorError
from skipbus.shared.protocol.system_ids import validate_system_id
from skipbus.shared.settings.peers import identity_line

_SERVICES = ("api", "syncer", "janitor")
_HOSTS = ["localhost", "127.0.0.1", "::1"]
_FIRST_PORT = 8443
_PORT_STEP = 1000
# Beside the api's own TLS port, in the network that they share.
_STUNNEL_PORT = 9443
_LIFETIMES = ("# Seconds; alike at all key providers.", "KEY_TTL_SECONDS=3600", "EPOCH_SECONDS=600")


def register(commands: Commands) -> None:
    """Add `site` and its subcommands."""
    group = add_group(commands, "site", "make folders for Compose, and join sites")
    init = add_command(group, "init", "make a folder with .env, secrets, certificates and definitions", _init)
    init.add_argument("folder", type=Path, help="a new or empty folder")
    init.add_argument("--kp", action="append", required=True, help="a key provider's id; two of them share the store")
    init.add_argument("--peer", action="append", default=[], help="an id at another site, where this site has one --kp")
    init.add_argument(
        "--broker", metavar="HOST[:PORT]", help="with --peer: where other sites reach this site's broker (port 5671)"
    )
    init.add_argument("--host", action="append", help=f"a name or address of the api (default {', '.join(_HOSTS)})")
    invite = add_command(group, "invite", "make a hand-over file for another site", _invite)
    invite.add_argument("folder", type=Path, help="this site's folder")
    invite.add_argument("peer", help="the other key provider's id")
    join = add_command(group, "join", "read another site's hand-over file", _join)
    join.add_argument("folder", type=Path, help="this site's folder")
    join.add_argument("handover", type=Path, nargs="+", help="the file that the other site made for this one")
    pair = add_command(group, "pair", "make two joined sites on one host, to try them out", _pair)
    pair.add_argument("sites", nargs=2, metavar="FOLDER=ID", help="a new or empty folder, and its key provider's id")


def _init(arguments: argparse.Namespace, _environ: Mapping[str, str]) -> int:
    folder, ids, peers = arguments.folder, arguments.kp, arguments.peer
    _check(ids, peers, arguments.broker)
    hosts = arguments.host or _HOSTS
    with _new(folder):
        if peers:
            _make_site(folder, ids[0], peers, hosts, parse_broker(arguments.broker))
        else:
            _make_shared(folder, ids, hosts)
    print(f"made {folder} for {' and '.join(ids)}\n")
    if peers:
        _tell_handovers(folder)
        print(f"skipctl site join {folder} FILE      for each file that another site made for this one, then")
    print(f"docker compose --project-directory {folder} up -d --wait")
    return 0


def _invite(arguments: argparse.Namespace, _environ: Mapping[str, str]) -> int:
    _check_id(arguments.peer)
    with _refused_writes(arguments.folder):
        made = SiteFolder(arguments.folder).invite(arguments.peer)
    print(f"{made}: secret; give it to the operator of {arguments.peer}. If the site runs already:\n")
    print(f"docker compose --project-directory {arguments.folder} restart rabbitmq")
    return 0


def _join(arguments: argparse.Namespace, _environ: Mapping[str, str]) -> int:
    folder: Path = arguments.folder
    site = SiteFolder(folder)
    for path in arguments.handover:
        handover = read_handover(path)
        with _refused_writes(folder):
            site.join(handover)
        print(
            f"{site.system_id} accepts the identity {fingerprint(handover.identity)} for {handover.sender}:"
            " compare it by telephone"
        )
        print(f"its broker is {handover.broker[0]}:{handover.broker[1]}. {path} is not needed any more: delete it\n")
    print(f"docker compose --project-directory {folder} up -d --wait")
    print("if the site runs already, then also: restart rabbitmq syncer janitor api, and at the end: restart api-b")
    return 0


def _pair(arguments: argparse.Namespace, _environ: Mapping[str, str]) -> int:
    named = [text.partition("=") for text in arguments.sites]
    folders, ids = [Path(name) for name, _, _ in named], [system_id for _, _, system_id in named]
    if folders[0].resolve() == folders[1].resolve() or ids[0] == ids[1]:
        raise OperatorError("name two folders and two ids, as paris=KP_Paris oslo=KP_Oslo")
    for folder, system_id in zip(folders, ids, strict=True):
        _check_id(system_id)
        check_new(folder)
    for number, folder in enumerate(folders):
        with _new(folder):
            broker = parse_broker(_project_name(folder))
            _make_site(folder, ids[number], [ids[1 - number]], _HOSTS, broker, first=number == 0)
    for here, there in (folders, folders[::-1]):
        with _refused_writes(here):
            (made,) = (there / "handover").iterdir()
            SiteFolder(here).join(read_handover(made))
            made.unlink()
    print(f"made {folders[0]} and {folders[1]}, which are joined. Start them in this order:\n")
    for folder in folders:
        print(f"docker compose --project-directory {folder} up -d")
    return 0


def _check(ids: list[str], peers: list[str], broker: str | None) -> None:
    if len(set(ids)) != len(ids) or len(ids) != (1 if peers else len(SHARED_PLACES)):
        raise OperatorError("give --kp twice, for two that share a store, or once with --peer, for a site of its own")
    if set(ids) & set(peers) or len(set(peers)) != len(peers):
        raise OperatorError("a --peer is this site's own --kp, or stands there twice")
    for system_id in (*ids, *peers):
        _check_id(system_id)
    if bool(peers) != (broker is not None):
        raise OperatorError("--peer and --broker go together: other sites' brokers fetch from this site's")
    if broker is not None:
        parse_broker(broker)


def _check_id(system_id: str) -> None:
    try:
        validate_system_id(system_id)
    except ValueError as error:
        raise OperatorError(f"{system_id!r}: {error}") from error
    # Compose reads `$` and quotes in .env for itself.
    if set(system_id) & set("$'\"\\"):
        raise OperatorError(f"{system_id!r} has a character that .env and TOML files cannot hold as it is")


@contextmanager
def _new(folder: Path) -> Iterator[None]:
    """A new folder that the block fills; afterwards every file gets its owner."""
    check_new(folder)
    with _refused_writes(folder):
        folder.mkdir(parents=True, exist_ok=True)
        owners = owners_of(folder)
        yield
        give(folder, owners)


@contextmanager
def _refused_writes(folder: Path) -> Iterator[None]:
    """New files are readable by their owner only. Raises OperatorError for a file that cannot be written."""
    os.umask(0o077)
    try:
        yield
    except OSError as error:
        raise OperatorError(f"{error.filename or folder}: {error.strerror}") from error


def _tell_handovers(folder: Path) -> None:
    print("secret; give each to the operator of the other site, by a way that you trust:")
    for made in sorted((folder / "handover").iterdir()):
        print(f"    {made}")
    print((folder / "identity").read_text().splitlines()[0].removeprefix("# ") + "\n")


def _make_shared(folder: Path, ids: list[str], hosts: list[str]) -> None:
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


def _make_site(
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
        f"COMPOSE_PROJECT_NAME={_project_name(folder)}",
        "SKIPBUS_IMAGE=skipbus:latest",
        "# Where ports are published.",
        "ADDRESS=0.0.0.0",
    ]


def _lines(*lines: str) -> str:
    return "\n".join(lines) + "\n"


def _project_name(folder: Path) -> str:
    plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in folder.resolve().name.lower())
    return f"skipbus-{plain.strip('-') or 'site'}"
