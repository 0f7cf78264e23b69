"""Owners and modes in a folder for Compose, and how its files are written and replaced.

Files of the services belong to the image's user only. Files of the database's and the broker's images must be readable
by their users, whose ids are unknown here, so the folders `secrets` and `rabbitmq` above protect them (a container sees
only what is mounted). Everything else belongs to the operator.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from skipbus.shared.errors import OperatorError

# The image's user.
SERVICE_USER = 10001
# The names of the key providers in the Compose files: two that share a store, or the only one.
SHARED_PLACES = ("alice", "bob")
SITE_PLACE = "site"
# The keyring waits there until the first `up`.
NEW_KEYRING = "keyring"


@dataclass(frozen=True)
class Owners:
    """The two owners: the services' user, and the operator, who owns the folder above."""

    service: tuple[int, int]
    operator: tuple[int, int]


def owners_of(folder: Path) -> Owners:
    """Raises OperatorError if this process cannot change owners."""
    if os.geteuid() not in (0, SERVICE_USER):
        raise OperatorError(
            f"secrets must be given to user {SERVICE_USER}, which the services run as: run this as root, for example "
            "in the image with `docker run --rm --user 0`"
        )
    above = folder.resolve().parent.stat()
    return Owners((SERVICE_USER, SERVICE_USER), (above.st_uid, above.st_gid))


def check_new(folder: Path) -> None:
    """Raises OperatorError if the folder is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OperatorError(f"{folder} is not an empty folder; nothing is overwritten")


def write_new(path: Path, text: str, mode: int = 0o600) -> None:
    """Writes a file that must not exist yet."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
        # Independent of the umask.
        os.fchmod(file.fileno(), mode)


def replace(path: Path, text: str, mode: int = 0o600) -> None:
    """Replaces a file in one step, or makes it. It gets the owner of its folder."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    write_new(temporary, text, mode)
    above = path.parent.stat()
    os.chown(temporary, above.st_uid, above.st_gid)
    temporary.replace(path)


def give(folder: Path, owners: Owners) -> None:
    """Sets owners: the services' user for what the services read, the operator for everything else."""
    service = {(place,) for place in (*SHARED_PLACES, SITE_PLACE, NEW_KEYRING)}
    for path in (folder, *folder.rglob("*")):
        inside = path.relative_to(folder).parts
        served = inside[:1] in service or (inside[:1] == ("secrets",) and len(inside) == 2)
        os.chown(path, *(owners.service if served else owners.operator))


def read_environment(folder: Path) -> dict[str, str]:
    """The values of `.env`. Raises OperatorError if it is not the folder of a site."""
    try:
        lines = (folder / ".env").read_text().splitlines()
    except OSError as error:
        raise OperatorError(f"{folder} is not a folder that `skipctl site init` made: {error.strerror}") from error
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    return {name: value.strip().strip("'") for name, value in pairs}
