"""Owns the places that configuration comes from: the environment, files of one secret, one TOML file.

Rules: the environment wins over the TOML file; a name that means nothing here is a problem, with the
nearest name that does; every problem is one text that names the variable or the file, what is wrong and
the fix, and holds no secret.
Leaves to others: what the options accept (`skipbus.shared.options`), and what is checked across them
(`skipbus.shared.config`).
"""

from __future__ import annotations

import difflib
import os
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from skipbus.shared.options import (
    CONFIG_FILE,
    EARLIER_NAMES,
    IDENTITIES_PLACE,
    OPTIONS,
    PEERS_PLACE,
    REMOTE_PLACE,
    REMOTE_PREFIX,
    Option,
    known_names,
    remote_number,
)

ENVIRONMENT = "environment"
_MAX_FILE_OCTETS = 1 << 20


class ProblemError(Exception):
    """One thing that is wrong, as a text for the operator."""


@dataclass(frozen=True)
class Raw:
    """A value's text, the name that a problem with it is reported under, and where it came from."""

    text: str
    name: str
    origin: str


@dataclass
class Sources:
    """Everything that was given. `toml` maps dotted places to values; `problems` grows while it is read."""

    environ: Mapping[str, str]
    toml_path: str | None = None
    toml: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def find(self, option: Option) -> Raw | None:
        """The option's text, or None where nobody gave one. Raises `ProblemError`."""
        if option.secret:
            return _find_secret(option, self.environ)
        for name in (option.name, EARLIER_NAMES.get(option.name, "")):
            if name in self.environ:
                return _from_environ(name, option, self.environ)
        if option.place in self.toml:
            return self._from_toml(option.place, self.toml[option.place], option.kind.toml_types)
        return None

    def find_remotes(self) -> list[Raw | ProblemError]:
        """The remote ids in their order: by number in the environment, else as listed in the TOML file."""
        numbers = sorted(filter(None, map(remote_number, self.environ)))
        if numbers:
            names = [f"{REMOTE_PREFIX}{n}" for n in numbers]
            return [Raw(self.environ[name], name, ENVIRONMENT) for name in names]
        listed = self.toml.get(REMOTE_PLACE, [])
        if not isinstance(listed, list):
            return [ProblemError(f'{self.toml_path}: {REMOTE_PLACE} is not a list. Write it as ["KP_Bob"].')]
        return [self._remote_from_toml(value) for value in listed]

    def find_identities(self) -> dict[str, Any]:
        """What stands in the TOML table of identities, by pattern."""
        prefix = f"{IDENTITIES_PLACE}."
        return {place.removeprefix(prefix): value for place, value in self.toml.items() if place.startswith(prefix)}

    def find_peers(self) -> object:
        """What stands under peers in the TOML file, an empty list where nothing does."""
        is_one_table = any(place.startswith(f"{PEERS_PLACE}.") for place in self.toml)
        return None if is_one_table else self.toml.get(PEERS_PLACE, [])

    def _remote_from_toml(self, value: object) -> Raw | ProblemError:
        try:
            return self._from_toml(REMOTE_PLACE, value, (str,))
        except ProblemError as problem:
            return problem

    def _from_toml(self, place: str, value: object, types: tuple[type, ...]) -> Raw:
        name = f"{self.toml_path}: {place}"
        # bool is a subclass of int, so the exact type decides: `port = true` is not a number.
        if type(value) not in types:
            wanted = {str: "a text in quotes", bool: "true or false"}.get(types[0], "a number without quotes")
            raise ProblemError(f"{name} has the wrong type. Write it as {wanted}.")
        text = str(value).lower() if isinstance(value, bool) else str(value)
        return Raw(text, name, f"TOML {self.toml_path}")


def read_sources(environ: Mapping[str, str]) -> Sources:
    """Read the TOML file, where one is named, and note every name that means nothing here."""
    sources = Sources(environ)
    sources.problems.extend(_unknown_variables(environ))
    if CONFIG_FILE in environ:
        sources.toml_path = environ[CONFIG_FILE]
        try:
            sources.toml = _read_toml(sources.toml_path)
        except ProblemError as problem:
            sources.problems.append(str(problem))
        sources.problems.extend(_unknown_places(sources.toml_path, sources.toml))
    return sources


def _from_environ(name: str, option: Option, environ: Mapping[str, str]) -> Raw:
    if not environ[name]:
        raise ProblemError(f"{name} is empty. {option.fix}")
    return Raw(environ[name], name, ENVIRONMENT if name == option.name else f"{ENVIRONMENT} ({name})")


def _find_secret(option: Option, environ: Mapping[str, str]) -> Raw | None:
    if option.name in environ and option.file_name in environ:
        raise ProblemError(f"{option.name} and {option.file_name} are both set. Remove one of them.")
    if option.file_name in environ:
        return _from_secret_file(option.file_name, environ[option.file_name])
    return _from_environ(option.name, option, environ) if option.name in environ else None


def _from_secret_file(name: str, path: str) -> Raw:
    try:
        text = _read_secret_file(path)
    except OSError as error:
        raise ProblemError(
            f"{name}: {path!r} cannot be read ({error.strerror}). Name a file that this user can read."
        ) from error
    except ValueError as error:
        raise ProblemError(f"{name}: {path!r} {error}") from error
    return Raw(text, name, f"file {path}")


def _read_secret_file(path: str) -> str:
    octets, mode = read_regular_file(path)
    # Any account of the host could have read it, or could replace it: the secret is no secret any more.
    if mode & 0o007:
        raise ValueError("is open to every user of this host. Close it with chmod o-rwx, and change the secret.")
    try:
        text = octets.decode()
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8. Write the secret as text.") from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise ValueError("is empty. Write the secret into it.")
    return text


def read_regular_file(path: str) -> tuple[bytes, int]:
    """Read the whole file; the mode is the opened file's, so that a swap after the check gains nothing."""
    # O_NONBLOCK, because opening a FIFO that nobody writes to would hold the start for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise ValueError("is not a regular file. Name a regular file.")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            octets = file.read(_MAX_FILE_OCTETS + 1)
    finally:
        os.close(descriptor)
    if len(octets) > _MAX_FILE_OCTETS:
        raise ValueError("is larger than 1 MiB. Name the right file.")
    return octets, mode


def _unknown_variables(environ: Mapping[str, str]) -> Iterator[str]:
    known = known_names()
    for name in sorted(environ):
        if name.startswith("SKIP_") and name not in known and remote_number(name) is None:
            yield f"{shown(name)} is not a known variable. {_nearest(name, known)}"


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"Did you mean {found[0]}?" if found else "Remove it."


def shown(text: str) -> str:
    """`text` as it may stand in a message: short, and printable whatever it holds."""
    return ascii(text)[1:-1] if len(text) <= 80 else f"{ascii(text[:80])[1:-1]}..."


def _read_toml(path: str) -> dict[str, Any]:
    if not path:
        raise ProblemError(f"{CONFIG_FILE} is empty. Set it to a TOML file, or remove it.")
    try:
        return dict(_leaves(tomllib.loads(read_regular_file(path)[0].decode())))
    except OSError as error:
        fault = f"cannot be read ({error.strerror}). Name a file that this user can read."
    except UnicodeDecodeError:
        fault = "is not UTF-8. Save it as UTF-8."
    except tomllib.TOMLDecodeError as error:
        fault = f"is not TOML: {error}. Correct it."
    except ValueError as error:
        fault = str(error)
    raise ProblemError(f"{CONFIG_FILE}: {path!r} {fault}")


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _unknown_places(path: str, places: Mapping[str, Any]) -> Iterator[str]:
    secrets = {option.place: option for option in OPTIONS if option.secret}
    known = [option.place for option in OPTIONS if not option.secret] + [REMOTE_PLACE, PEERS_PLACE]
    for place, value in places.items():
        if place in secrets:
            yield f"{path}: {place} is a secret. Remove it from this file and set {secrets[place].file_name}."
        elif place.startswith((f"{IDENTITIES_PLACE}.", f"{PEERS_PLACE}.")):
            continue
        elif place not in known and not _is_empty_table(place, value, known):
            yield f"{path}: {shown(place)} is not a known key. {_nearest(place, known)}"


def _is_empty_table(place: str, value: object, known: Iterable[str]) -> bool:
    return value == {} and any(name.startswith(f"{place}.") for name in known)
