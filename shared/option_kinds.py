"""Owns the kinds of values that options have: what each accepts, and how its wish reads in an error.

Rules: pure functions without I/O; a parser takes text and raises `ValueError`, with a sentence of its own
or without one where "is not <wants>" says it all; a parser of a secret never puts the text into its
sentence.
Leaves to others: the options themselves (`skipbus.shared.options`), and where the text comes from
(`skipbus.shared.config_sources`).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from skipbus.shared.secret import Secret

NO_FILE = "none"
_N = TypeVar("_N", int, float)
_TRUE = frozenset({"true", "1", "yes"})
_FALSE = frozenset({"false", "0", "no"})
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_DATABASE_NAME = re.compile(r"[A-Za-z0-9_$-]{1,64}")


@dataclass(frozen=True)
class Kind:
    """What an option accepts. `toml_types` are the TOML types that may be written as its text."""

    wants: str
    parse: Callable[[str], Any]
    toml_types: tuple[type, ...] = (str,)


def whole(low: int, high: int, unit: str = "") -> Kind:
    """A whole number in ASCII digits, from `low` to `high`."""
    wants = f"a whole number{unit and ' of ' + unit} from {low} to {high}"
    return Kind(wants, lambda text: _bounded(text, r"[0-9]{1,18}", int, low, high), (int,))


def number(low: float, high: float, unit: str) -> Kind:
    """A decimal number without sign or exponent, from `low` to `high`."""
    wants = f"a number of {unit} from {low:g} to {high:g}"
    return Kind(wants, lambda text: _bounded(text, r"[0-9]{1,9}(\.[0-9]{1,18})?", float, low, high), (int, float))


def _bounded(text: str, form: str, convert: Callable[[str], _N], low: _N, high: _N) -> _N:
    if not re.fullmatch(form, text) or not low <= convert(text) <= high:
        raise ValueError
    return convert(text)


def choice(*words: str) -> Kind:
    """One of `words`, in any case."""
    return Kind(f"{', '.join(words[:-1])} or {words[-1]}", lambda text: _chosen(text.lower(), words))


def _chosen(text: str, words: tuple[str, ...]) -> str:
    if text not in words:
        raise ValueError
    return text


def yes_no() -> Kind:
    """true, 1, yes, false, 0 or no, in any case."""
    return Kind("true or false", _yes_no, (bool,))


def _yes_no(text: str) -> bool:
    if text.lower() not in _TRUE | _FALSE:
        raise ValueError
    return text.lower() in _TRUE


def host() -> Kind:
    """A host name, or an IPv4 or IPv6 address without brackets."""
    return Kind("a host name or an IP address, without a port", _host)


def _host(text: str) -> str:
    if not _HOST_NAME.fullmatch(text) and not _is_address(text):
        raise ValueError
    return text


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def folder() -> Kind:
    """A folder's path; a relative one is fixed to the working directory of the start."""
    return Kind("the path of a folder", _folder)


def _folder(text: str) -> Path:
    if text.startswith("~"):
        raise ValueError("'~' is written by a shell only and means nothing here")
    if "\0" in text:
        raise ValueError
    return Path(text).absolute()


def files(most: int) -> Kind:
    """Paths of files with commas between them, at most ``most``; "none" is none."""
    wants = "the path of a file" if most == 1 else f"the paths of at most {most} files with a comma between them"
    return Kind(wants, lambda text: _files(text, most))


def _files(text: str, most: int) -> tuple[Path, ...]:
    if text == NO_FILE:
        return ()
    paths = tuple(_folder(part.strip()) for part in text.split(",") if part.strip())
    if not 1 <= len(paths) <= most:
        raise ValueError
    return paths


def database_name() -> Kind:
    """A database's name in characters that need no quoting."""
    return Kind("a name of 1 to 64 letters, digits, '_', '$' or '-'", _database_name)


def _database_name(text: str) -> str:
    if not _DATABASE_NAME.fullmatch(text):
        raise ValueError
    return text


def account_name() -> Kind:
    """A MySQL or MariaDB account's name."""
    return Kind("a name of 1 to 80 printable characters", _account_name)


def _account_name(text: str) -> str:
    if not 1 <= len(text) <= 80 or not text.isprintable():
        raise ValueError
    return text


def password() -> Kind:
    """Any text without NUL."""
    return Kind("a password", _password)


def _password(text: str) -> Secret:
    if "\0" in text or not _is_unicode(text):
        raise ValueError("the password holds a NUL or is not UTF-8")
    return Secret(text)


def amqp_url() -> Kind:
    """An AMQP URL. It usually holds a password, so its text is in no error."""
    return Kind("a URL such as amqp://user:password@host:5672/", _amqp_url)


def _amqp_url(text: str) -> Secret:
    if not text.isprintable() or " " in text:
        raise ValueError("the URL holds a blank or a control character")
    try:
        parts = urlsplit(text)
        parsed = parts.scheme in {"amqp", "amqps"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        parsed = False
    if not parsed:
        # The cause is dropped on purpose: urlsplit quotes what it could not read, which may be the password.
        raise ValueError("the URL cannot be read as amqp:// or amqps:// with a host") from None
    return Secret(text)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
