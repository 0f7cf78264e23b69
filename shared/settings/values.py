"""What a setting may hold: the types of the model's fields, how a text becomes a value, and a type in words.

Rules: msgspec converts and bounds numbers, words and booleans; a `Text` in an annotation reads everything else. A
parser raises `ValueError`, without a sentence if "is not <wants>" says it all. No sentence has the text of a secret.
Files that an operator names are read here too.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from skipbus.shared.protocol.system_ids import validate_system_id
from skipbus.shared.settings.secret import Secret

NO_FILE = "none"
CLOSE_MOUNT = (
    "where an orchestrator mounts it, set the mount's own option: `mode: 0400` and `uid` (Compose), `defaultMode: 0400`"
    " or `fsGroup` with 0440 (Kubernetes)"
)
_MAX_FILE_OCTETS = 1 << 20
_MAX_SHOWN = 80
_SIMILAR = 0.6
_WORDS_FOR_BOOL = {"yes": "true", "no": "false"}
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_DIGITS = re.compile(r"[0-9]{1,18}(\.[0-9]{1,18})?")


@dataclass(frozen=True)
class Text:
    """Beside a type in `Annotated`: what the text must be, in words, and how it is read."""

    wants: str
    parse: Callable[[str], Any]


def parse(hint: Any, text: str) -> Any:  # noqa: ANN401 -- the type of a field, and its value
    """The value of a field of this type. Raises ValueError."""
    base, notes = _parts(hint)
    for note in notes:
        if isinstance(note, Text):
            return note.parse(text)
    if (base in (int, float) and not _DIGITS.fullmatch(text)) or (base is int and "." in text):
        raise ValueError
    word = text if base in (int, float) else _WORDS_FOR_BOOL.get(text.lower(), text.lower())
    try:
        return msgspec.convert(word, hint, strict=False)
    except msgspec.ValidationError:
        raise ValueError from None


def wants(hint: Any, unit: str = "") -> str:  # noqa: ANN401
    """What a field of this type accepts, in words."""
    base, notes = _parts(hint)
    for note in notes:
        if isinstance(note, Text):
            return note.wants
        if isinstance(note, Meta):
            kind = "a whole number" if base is int else "a number"
            return f"{kind}{unit and ' of ' + unit} from {note.ge} to {note.le}"
    return "true or false" if base is bool else " or ".join(", ".join(get_args(base)).rsplit(", ", 1))


def toml_types(hint: Any) -> tuple[type, ...]:  # noqa: ANN401
    """The TOML types that a field of this type takes."""
    base, _ = _parts(hint)
    return {int: (int,), float: (int, float), bool: (bool,)}.get(base, (str,))


def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:  # noqa: ANN401
    return (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def shown(text: str) -> str:
    """The text as it may be in a message: short and printable."""
    return ascii(text)[1:-1] if len(text) <= _MAX_SHOWN else f"{ascii(text[:_MAX_SHOWN])[1:-1]}..."


def suggestion(name: str, known: Iterable[str]) -> str:
    """What to do about an unknown name: take the known name whose words are most similar, or remove it."""
    similar = max(known, key=lambda other: _similarity(name, other))
    return f"Did you mean {similar}?" if _similarity(name, similar) >= _SIMILAR else "Remove it."


def _similarity(name: str, other: str) -> float:
    """From 0 to 1: how much of the words of both names is in the other one too."""
    words, others = (re.split(r"[_.]", text.removeprefix("SKIP_").lower()) for text in (name, other))
    best = (max(difflib.SequenceMatcher(None, word, o).ratio() for o in others) for word in words)
    return 2 * sum(best) / (len(words) + len(others))


def read_regular_file(path: str) -> tuple[bytes, int]:
    """The whole file, and the mode of the file that was opened. Raises OSError, and ValueError with a sentence."""
    # O_NONBLOCK: opening a FIFO that has no writer would wait forever.
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


def is_open_to_others(path: str, mode: int) -> bool:
    """Whether any account of this host can open a file of this mode: not where a folder above it keeps them out.

    Orchestrators mount secrets with mode 0444, in a folder that only the container can enter. Raises OSError.
    """
    return bool(mode & 0o007) and all(folder.stat().st_mode & 0o001 for folder in Path(path).resolve().parents)


def _host(text: str) -> str:
    if not _HOST_NAME.fullmatch(text):
        ipaddress.ip_address(text)
    return text


def split_address(text: str) -> tuple[str, int | None]:
    """A host, and the port if there is one: `db1`, `db1:3306`, `10.0.0.1`, `2001:db8::1`, `[2001:db8::1]:3306`.

    Raises ValueError.
    """
    host, colon, port = text.rpartition(":")
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        colon, port = rest[:1], rest[1:]
        if not bracket or (rest and colon != ":"):
            raise ValueError
        ipaddress.IPv6Address(host)
    elif not colon or ":" in host:
        host, colon = text, ""
    number = int(port) if colon and port.isascii() and port.isdigit() else None
    if bool(colon) != (number is not None) or (number is not None and not 1 <= number <= 65535):
        raise ValueError
    return _host(host), number


def address_text(host: str, port: int) -> str:
    """An address as `split_address` reads it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _hosts(text: str) -> str:
    addresses = [split_address(part.strip()) for part in text.split(",")]
    if len(set(addresses)) != len(addresses):
        raise ValueError("a server is named twice")
    return text


def _matching(pattern: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text) or not text.isprintable():
            raise ValueError
        return text

    return check


def _path(text: str) -> Path:
    if text.startswith("~"):
        raise ValueError("'~' is written by a shell only and means nothing here")
    if "\0" in text:
        raise ValueError
    return Path(text).absolute()


def _files(most: int) -> Text:
    def parse_files(text: str) -> tuple[Path, ...]:
        paths = () if text == NO_FILE else tuple(_path(part.strip()) for part in text.split(",") if part.strip())
        if text != NO_FILE and not 1 <= len(paths) <= most:
            raise ValueError
        return paths

    words = "the path of a file" if most == 1 else f"the paths of at most {most} files with a comma between them"
    return Text(words, parse_files)


def _password(text: str) -> Secret:
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the password holds a NUL or is not UTF-8")
    return Secret(text)


def split_urls(text: str) -> list[str]:
    """The URLs of a list with commas. A password may hold a comma, but not one with a scheme behind it."""
    return re.split(r",(?=amqps?://)", text)


def _amqp_urls(text: str) -> Secret:
    if not text.isprintable() or " " in text:
        raise ValueError("the URL holds a blank or a control character")
    if not all(map(_is_amqp_url, split_urls(text))):
        raise ValueError("the URL cannot be read as amqp:// or amqps:// with a host")
    return Secret(text)


def _is_amqp_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in {"amqp", "amqps"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        # Without its cause: urlsplit quotes what it could not read, which may be the password.
        return False


Environment = Literal["development", "production"]
LogLevel = Literal["debug", "info", "warning", "error"]
Port = Annotated[int, Meta(ge=1, le=65535)]
Wait = Annotated[float, Meta(ge=0.1, le=300)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
SystemId = Annotated[str, Text("an id of 1 to 64 printable ASCII characters such as KP_Alice", validate_system_id)]
Host = Annotated[str, Text("a host name or an IP address, without a port", _host)]
Hosts = Annotated[
    str, Text("a host name or IP address, or several with commas between them; each may have a :port", _hosts)
]
AccountName = Annotated[str, Text("a name of 1 to 80 printable characters", _matching(r"(?s:.){1,80}"))]
DatabaseName = Annotated[
    str, Text("a name of 1 to 64 letters, digits, '_', '$' or '-'", _matching(r"[A-Za-z0-9_$-]{1,64}"))
]
Password = Annotated[Secret, Text("a password", _password)]
AmqpUrls = Annotated[
    Secret, Text("a URL such as amqp://user:password@host:5672/, or several with commas between them", _amqp_urls)
]
Folder = Annotated[Path, Text("the path of a folder", _path)]
OneFile = Annotated[tuple[Path, ...], _files(1)]
TwoFiles = Annotated[tuple[Path, ...], _files(2)]
