"""``skipctl site init|invite|join|pair``: folders for Compose, with `.env`, secrets, certificates and definitions.

Owns the commands. ``init`` and ``pair`` never overwrite: the folder must be new or empty.
``skipctl/site_files.py`` writes the files, ``skipctl/site_folder.py`` sets owners and modes, ``skipctl/site_link.py``
joins two sites.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from skipbus.ctl.command import Commands, add_command, add_group
from skipbus.ctl.handover import parse_broker, read_handover
from skipbus.ctl.site_files import make_shared_store, make_site, project_name
from skipbus.ctl.site_folder import SHARED_PLACES, check_new, give, owners_of
from skipbus.ctl.site_link import SiteFolder
from skipbus.shared.crypto.identity import fingerprint
from skipbus.shared.errors import OperatorError
from skipbus.shared.protocol.system_ids import validate_system_id

_HOSTS = ["localhost", "127.0.0.1", "::1"]


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
            make_site(folder, ids[0], peers, hosts, parse_broker(arguments.broker))
        else:
            make_shared_store(folder, ids, hosts)
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
            broker = parse_broker(project_name(folder))
            make_site(folder, ids[number], [ids[1 - number]], _HOSTS, broker, first=number == 0)
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
    """A new folder that the block fills; then every file gets its owner."""
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
