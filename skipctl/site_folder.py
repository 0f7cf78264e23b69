"""Owns who may read what in a folder for Compose, and how a file of it is written and replaced.

Rules: what the services read belongs to the image's user and to nobody else; what the images of the database and the
broker read must be open to their users, whose numbers nobody here knows, and is guarded by the folders `secrets` and
`rabbitmq` above it (a container sees what is mounted alone). Everything else is the operator's.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from skipbus.shared.errors import OperatorError

# The image's user.
SERVICE_USER = 10001
# What the Compose files call the key providers: those that share a store, or the only one.
SHARED_PLACES = ("alice", "bob")
SITE_PLACE = "site"
# The keyring waits there until the first `up`.
NEW_KEYRING = "keyring"


@dataclass(frozen=True)
class Owners:
    """Who owns what: the services' user, and the operator, to whom the folder above belongs."""

    service: tuple[int, int]
    operator: tuple[int, int]


def owners_of(folder: Path) -> Owners:
    """Raises OperatorError where this process cannot give files away."""
    if os.geteuid() not in (0, SERVICE_USER):
        raise OperatorError(
            f"secrets must be given to user {SERVICE_USER}, which the services run as: run this as root, for example "
            "in the image with `docker run --rm --user 0`"
        )
    above = folder.resolve().parent.stat()
    return Owners((SERVICE_USER, SERVICE_USER), (above.st_uid, above.st_gid))


def check_new(folder: Path) -> None:
    """Raises OperatorError where the folder holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OperatorError(f"{folder} is not an empty folder; nothing is overwritten")


def write_new(path: Path, text: str, mode: int = 0o600) -> None:
    """A file that is not there yet."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
        # Whatever the umask left of it.
        os.fchmod(file.fileno(), mode)


def replace(path: Path, text: str, mode: int = 0o600) -> None:
    """A file that may be there: the old one whole, or the new one whole. It belongs to whom its folder belongs."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    write_new(temporary, text, mode)
    above = path.parent.stat()
    os.chown(temporary, above.st_uid, above.st_gid)
    temporary.replace(path)


def give(folder: Path, owners: Owners) -> None:
    """Everything to the operator, but to the services what they read."""
    service = {(place,) for place in (*SHARED_PLACES, SITE_PLACE, NEW_KEYRING)}
    for path in (folder, *folder.rglob("*")):
        inside = path.relative_to(folder).parts
        served = inside[:1] in service or (inside[:1] == ("secrets",) and len(inside) == 2)
        os.chown(path, *(owners.service if served else owners.operator))


def read_environment(folder: Path) -> dict[str, str]:
    """What `.env` says. Raises OperatorError where it is not the folder of a site."""
    try:
        lines = (folder / ".env").read_text().splitlines()
    except OSError as error:
        raise OperatorError(f"{folder} is not a folder that `skipctl site init` made: {error.strerror}") from error
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    return {name: value.strip().strip("'") for name, value in pairs}
