"""``skipctl site init``: a ready folder for Compose: `.env`, secrets, certificates, pre-shared keys, definitions.

Owns which files a site has and who may read them. It never overwrites: the folder must be new or empty.

Rules: every password is random and in a file of its own. What the services read belongs to the image's user and to
nobody else; what the images of the database and the broker read must be open to their users, whose numbers nobody
here knows, and is guarded by the folder `secrets` and `rabbitmq` above them (a container sees the files alone). The
authority's private key and what clients need stay with the operator, outside of what any container mounts.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.errors import OperatorError
from shared.system_ids import validate_system_id
from skipctl.broker_definitions import CONFIGURATION, definitions
from skipctl.cert import make_certificates
from skipctl.command import Commands, add_command, add_group
from skipctl.provision import ROLES
from skipctl.shipped import read_shipped

# The image's user.
SERVICE_USER = 10001
# What the Compose files call the key providers: those that share a store, or the only one.
_SHARED_PLACES = ("alice", "bob")
_SITE_PLACE = "site"
_FIRST_PORT = 8443
_PORT_STEP = 1000
# Beside the api's own TLS port, in the network that they share.
_STUNNEL_PORT = 9443
_LIFETIMES = ("# Seconds; alike at all key providers.", "KEY_TTL_SECONDS=3600", "EPOCH_SECONDS=600")


@dataclass(frozen=True)
class Owners:
    """Who owns what: the services' user, and the operator, to whom the folder above belongs."""

    service: tuple[int, int]
    operator: tuple[int, int]


def register(commands: Commands) -> None:
    """Add `site` and its subcommand."""
    group = add_group(commands, "site", "folders for Compose")
    init = add_command(group, "init", "make a ready folder: .env, secrets, certificates, definitions", _init)
    init.add_argument("folder", type=Path, help="a new or empty folder")
    init.add_argument("--kp", action="append", required=True, help="a key provider's id; two of them share the store")
    init.add_argument("--peer", action="append", default=[], help="an id at another site, where this site has one --kp")
    init.add_argument(
        "--host", action="append", help="a name or address of the api (default localhost, 127.0.0.1, ::1)"
    )


def _init(arguments: argparse.Namespace, _environ: Mapping[str, str]) -> int:
    folder, ids = arguments.folder, arguments.kp
    _check(folder, ids, arguments.peer)
    os.umask(0o077)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        owners = _owners(folder)
        _write_site(folder, ids, arguments.peer, arguments.host or ["localhost", "127.0.0.1", "::1"], owners)
    except OSError as error:
        raise OperatorError(f"{error.filename or folder}: {error.strerror}") from error
    print(f"made {folder} for {' and '.join(ids)}\n")
    print(f"docker compose --project-directory {folder} up -d --wait")
    return 0


def _check(folder: Path, ids: list[str], peers: list[str]) -> None:
    if len(set(ids)) != len(ids) or len(ids) != (1 if peers else len(_SHARED_PLACES)):
        raise OperatorError("give --kp twice, for two that share a store, or once with --peer, for a site of its own")
    for system_id in (*ids, *peers):
        try:
            validate_system_id(system_id)
        except ValueError as error:
            raise OperatorError(f"{system_id!r}: {error}") from error
        # Compose reads `$` and quotes in .env for itself.
        if set(system_id) & set("$'\"\\"):
            raise OperatorError(f"{system_id!r} has a character that .env and TOML files cannot hold as it is")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OperatorError(f"{folder} is not an empty folder; nothing is overwritten")


def _owners(folder: Path) -> Owners:
    if os.geteuid() not in (0, SERVICE_USER):
        raise OperatorError(
            f"secrets must be given to user {SERVICE_USER}, which the services run as: run this as root, for example "
            "in the image with `docker run --rm --user 0`"
        )
    above = folder.resolve().parent.stat()
    return Owners((SERVICE_USER, SERVICE_USER), (above.st_uid, above.st_gid))


def _write_site(folder: Path, ids: list[str], peers: list[str], hosts: list[str], owners: Owners) -> None:
    places = (_SITE_PLACE,) if peers else _SHARED_PLACES
    for name in ("secrets", "rabbitmq", "clients", "authorities"):
        (folder / name).mkdir()
    syncers = {}
    for place, system_id in zip(places, ids, strict=True):
        password = secrets.token_hex(24)
        syncers[system_id] = (f"{place}_syncer", password)
        _write_accounts(folder / "secrets", place, password)
        _write_tls(folder, place, system_id, hosts)
    password = secrets.token_hex(24)
    _write(folder / "secrets" / "mysql_admin_password", password)
    _write(folder / "secrets" / "mysql_root_password", password, 0o444)
    _write(folder / "rabbitmq" / "rabbitmq.conf", CONFIGURATION, 0o444)
    _write(folder / "rabbitmq" / "definitions.json", definitions(syncers), 0o444)
    if peers:
        _write(folder / "compose.yaml", read_shipped("site.yaml"))
        _write(folder / "rabbitmq" / "enabled_plugins", "[rabbitmq_federation].\n", 0o444)
        _write(folder / "skipbus.toml", _toml(peers), 0o444)
        _write(folder / ".env", _site_environment(folder, ids[0]))
    else:
        stunnel = read_shipped("stunnel/stunnel.conf").replace("accept = 8443", f"accept = {_STUNNEL_PORT}")
        _write(folder / "stunnel.conf", stunnel, 0o444)
        _write(folder / "compose.yaml", read_shipped("shared-store.yaml"))
        _write(folder / "two-apis.yaml", read_shipped("two-apis.yaml"))
        _write(folder / ".env", _shared_environment(folder, ids))
    _give(folder, owners)


def _write_accounts(folder: Path, place: str, broker_password: str) -> None:
    for role in ROLES:
        _write(folder / f"{place}_{role}_mysql_password", secrets.token_hex(24))
    _write(folder / f"{place}_syncer_rabbitmq_url", f"amqp://{place}_syncer:{broker_password}@rabbitmq:5672/")


def _write_tls(folder: Path, place: str, system_id: str, hosts: list[str]) -> None:
    """An authority for one key provider, what its api serves with, and what a client of it needs."""
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
    _write(served / "psk.txt", line)
    _write(client / "psk.txt", line)
    _write(client / "system_id", f"{system_id}\n")


def _toml(peers: list[str]) -> str:
    listed = ", ".join(f'"{peer}"' for peer in peers)
    return f"# What all services of this site are told beside their variables.\nremote_system_ids = [{listed}]\n"


def _site_environment(folder: Path, system_id: str) -> str:
    return _lines(
        *_head(folder),
        "# The front keeps the port while the apis are exchanged: it changes only when this does.",
        "FRONT_IMAGE=skipbus:latest",
        f"SYSTEM_ID='{system_id}'",
        f"SITE_PORT={_FIRST_PORT}",
        *_LIFETIMES,
    )


def _shared_environment(folder: Path, ids: list[str]) -> str:
    lines = [
        *_head(folder),
        "# Used with two-apis.yaml: copy that to compose.override.yaml for two apis and a front for each key provider.",
        "FRONT_IMAGE=skipbus:latest",
        "# 8443 leads to the api's own TLS; 9443, with COMPOSE_PROFILES=stunnel, to stunnel.",
        "TLS_TARGET=8443",
    ]
    for number, (place, system_id) in enumerate(zip(_SHARED_PLACES, ids, strict=True)):
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


def _write(path: Path, text: str, mode: int = 0o600) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
        # Whatever the umask left of it.
        os.fchmod(file.fileno(), mode)


def _give(folder: Path, owners: Owners) -> None:
    """Everything to the operator, but to the services what they read."""
    for path in (folder, *folder.rglob("*")):
        inside = path.relative_to(folder).parts
        served = inside[:1] in [(place,) for place in (*_SHARED_PLACES, _SITE_PLACE)] or (
            inside[:1] == ("secrets",) and len(inside) == 2
        )
        os.chown(path, *(owners.service if served else owners.operator))
