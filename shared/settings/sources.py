"""Where settings come from: the environment, files of one secret, one TOML file.

Rules: the environment wins over the TOML file. A name that means nothing here is a problem, with the most similar name
that does. Each problem is one text that names the variable or the file, what is wrong and the fix, and has no secret.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from skipbus.shared.settings.model import (
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
from skipbus.shared.settings.values import (
    CLOSE_MOUNT,
    is_open_to_others,
    read_regular_file,
    shown,
    suggestion,
    toml_types,
)

ENVIRONMENT = "environment"
_LINK_URL = re.compile(r"(tcp|udp|sctp)://[^/]+:[0-9]+$")
_LINK_NAME = re.compile(r".+_SERVICE_(HOST|PORT(_.+)?)|.+_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")


class ProblemError(Exception):
    """One thing that is wrong, as a text for the operator."""


@dataclass(frozen=True)
class Raw:
    """A value's text, the name for a problem with it, and where it came from."""

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
        """The option's text; None if it is given nowhere. Raises `ProblemError`."""
        if option.secret and option.file_variable in self.environ:
            return self.secret_in_file(option)
        for name in (option.variable, EARLIER_NAMES.get(option.variable, "")):
            if name in self.environ:
                if not self.environ[name]:
                    raise ProblemError(f"{name} is empty. {option.fix}")
                origin = ENVIRONMENT if name == option.variable else f"{ENVIRONMENT} ({name})"
                return Raw(self.environ[name], name, origin)
        if option.place in self.toml and not option.secret:
            return self._toml_text(option.place, self.toml[option.place], toml_types(option.hint))
        return None

    def find_remotes(self) -> Iterator[Raw]:
        """The remote ids in their order: by number in the environment, else as listed in the TOML file."""
        numbers = sorted(filter(None, map(remote_number, self.environ)))
        for number in numbers:
            name = f"{REMOTE_PREFIX}{number}"
            yield Raw(self.environ[name], name, ENVIRONMENT)
        listed = [] if numbers else self.toml.get(REMOTE_PLACE, [])
        if not isinstance(listed, list):
            self.problems.append(f'{self.toml_path}: {REMOTE_PLACE} is not a list. Write it as ["KP_Bob"].')
            listed = []
        for value in listed:
            try:
                yield self._toml_text(REMOTE_PLACE, value, (str,))
            except ProblemError as problem:
                self.problems.append(str(problem))

    def find_identities(self) -> dict[str, Any]:
        """The TOML table of identities, by pattern."""
        prefix = f"{IDENTITIES_PLACE}."
        return {place.removeprefix(prefix): value for place, value in self.toml.items() if place.startswith(prefix)}

    def find_peers(self) -> object:
        """What the TOML file has under peers; an empty list if nothing."""
        is_one_table = any(place.startswith(f"{PEERS_PLACE}.") for place in self.toml)
        return None if is_one_table else self.toml.get(PEERS_PLACE, [])

    def secret_in_file(self, option: Option) -> Raw:
        """The text of the file that the option's variable names. Raises `ProblemError`."""
        name = option.file_variable
        if option.variable in self.environ:
            raise ProblemError(f"{option.variable} and {name} are both set. Remove one of them.")
        path = self.environ[name]
        try:
            return Raw(_read_secret(path), name, f"file {path}")
        except OSError as error:
            fault = f"cannot be read ({error.strerror}). Name a file that this user can read."
        except ValueError as error:
            fault = str(error)
        raise ProblemError(f"{name}: {path!r} {fault}")

    def _toml_text(self, place: str, value: object, types: tuple[type, ...]) -> Raw:
        name = f"{self.toml_path}: {place}"
        # bool is a subclass of int, so the exact type decides: `port = true` is not a number.
        if type(value) not in types:
            wanted = {str: "a text in quotes", bool: "true or false"}.get(types[0], "a number without quotes")
            raise ProblemError(f"{name} has the wrong type. Write it as {wanted}.")
        return Raw(str(value).lower() if isinstance(value, bool) else str(value), name, f"TOML {self.toml_path}")


def service_links(environ: Mapping[str, str]) -> frozenset[str]:
    """Variables that an orchestrator sets for its own services: they are no settings, whatever their names.

    For a service `mysql` it sets `MYSQL_SERVICE_HOST`, `MYSQL_PORT=tcp://10.96.12.7:3306`, `MYSQL_PORT_3306_TCP_ADDR`
    and others like these.
    """
    linked = {name for name, value in environ.items() if name.endswith("_PORT") and _LINK_URL.match(value)}
    named = {name for name in environ if _LINK_NAME.fullmatch(name)}
    return frozenset(name for name in linked | named if name.startswith("SKIP_") or name in known_names())


def read_sources(environ: Mapping[str, str]) -> Sources:
    """Reads the TOML file, if one is named, and notes every name that means nothing here."""
    ignored = service_links(environ)
    environ = {name: value for name, value in environ.items() if name not in ignored}
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


def _read_secret(path: str) -> str:
    octets, mode = read_regular_file(path)
    # Any account of the host could have read it, or could replace it.
    if is_open_to_others(path, mode):
        raise ValueError(
            f"is open to every user of this host. Close it with chmod o-rwx, and change the secret; {CLOSE_MOUNT}."
        )
    try:
        text = octets.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8. Write the secret as text.") from None
    if not text:
        raise ValueError("is empty. Write the secret into it.")
    return text


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


def _unknown_variables(environ: Mapping[str, str]) -> Iterator[str]:
    known = known_names()
    for name in sorted(environ):
        if name.startswith("SKIP_") and name not in known and remote_number(name) is None:
            yield f"{shown(name)} is not a known variable. {suggestion(name, known)}"


def _unknown_places(path: str, places: Mapping[str, Any]) -> Iterator[str]:
    secrets = {option.place: option for option in OPTIONS if option.secret}
    known = [option.place for option in OPTIONS if not option.secret] + [REMOTE_PLACE, PEERS_PLACE]
    for place, value in places.items():
        is_empty_table = value == {} and any(name.startswith(f"{place}.") for name in known)
        if place in secrets:
            yield f"{path}: {place} is a secret. Remove it from this file and set {secrets[place].file_variable}."
        elif place not in known and not is_empty_table and not place.startswith((IDENTITIES_PLACE + ".", "peers.")):
            yield f"{path}: {shown(place)} is not a known key. {suggestion(place, known)}"
