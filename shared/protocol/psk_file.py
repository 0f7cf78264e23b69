"""The file of TLS pre-shared keys, in stunnel's format: one ``identity:hex`` in each line.

Blank lines and lines that start with ``#`` or ``;`` are ignored. An identity has 1 to 127 bytes of UTF-8 without
control characters and without ``:``; a key has 256 to 2048 bits. A file that every user of the host can read is
refused, because its keys are not secret any more. All problems are reported together, each with its line and never
with a key. ``services.api.tls`` reads the file, ``skipctl psk`` writes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from skipbus.shared.errors import OperatorError
from skipbus.shared.settings.values import CLOSE_MOUNT, is_open_to_others, read_regular_file, shown

MAX_IDENTITY_BYTES = 127
MIN_KEY_BITS = 256
# OpenSSL and stunnel accept no longer keys.
MAX_KEY_BITS = 2048
_HEX = re.compile(rb"(?:[0-9a-fA-F]{2})+")
_COMMENT = (b"#", b";")


class PskFileError(OperatorError):
    """The file cannot be used; the message has one line for each problem."""


class PskKeys(Mapping[bytes, bytes]):
    """Keys by identity. Its repr shows only their number."""

    __slots__ = ("_keys",)

    def __init__(self, keys: Mapping[bytes, bytes] | None = None) -> None:
        self._keys = dict(keys or {})

    def __getitem__(self, identity: bytes) -> bytes:
        return self._keys[identity]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"<{len(self._keys)} pre-shared keys>"


def read_psk_file(path: Path) -> PskKeys:
    """The keys in the file. Raises PskFileError with all problems."""
    try:
        octets, mode = read_regular_file(str(path))
    except OSError as error:
        raise PskFileError(f"{path}: cannot be read ({error.strerror}); name a file that this user can read") from error
    except ValueError as error:
        raise PskFileError(f"{path}: {error}") from error
    if is_open_to_others(str(path), mode):
        raise PskFileError(
            f"{path}: is open to every user of this host; close it with chmod o-rwx, and change the keys in it; "
            + CLOSE_MOUNT
        )
    return parse_psk_file(octets, str(path))


def parse_psk_file(octets: bytes, name: str) -> PskKeys:
    """The keys in the content of the file ``name``. Raises PskFileError with all problems."""
    keys: dict[bytes, bytes] = {}
    lines: dict[bytes, int] = {}
    faults: list[str] = []
    for number, line in entries(octets):
        try:
            identity, key = parse_entry(line)
            _refuse_second(identity, lines)
        except ValueError as error:
            faults.append(f"{name}, line {number}: {error}")
            continue
        keys[identity], lines[identity] = key, number
    if faults:
        raise PskFileError("\n".join(faults))
    return PskKeys(keys)


def _refuse_second(identity: bytes, lines: Mapping[bytes, int]) -> None:
    if identity in lines:
        raise ValueError(f"the identity {shown_identity(identity)} stands in line {lines[identity]} already")


def entries(octets: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines that are neither blank nor comments, with their numbers from 1."""
    for number, line in enumerate(octets.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        line = line.removesuffix(b"\r")  # noqa: PLW2901 -- the same line without its line end
        if line.strip() and not line.startswith(_COMMENT):
            yield number, line


def parse_entry(line: bytes) -> tuple[bytes, bytes]:
    """Identity and key of one line. Raises ValueError with a sentence without the key."""
    identity, colon, text = line.partition(b":")
    if not colon:
        raise ValueError("it is not written as identity:hex")
    validate_identity(identity)
    return identity, _parse_key(text.rstrip(b" \t"))


def validate_identity(identity: bytes) -> None:
    """Raises ValueError with a sentence if it cannot be an identity (RFC 4279, 5; stunnel's format)."""
    if not identity:
        raise ValueError("the identity is empty")
    if len(identity) > MAX_IDENTITY_BYTES:
        raise ValueError(f"the identity has {len(identity)} bytes; at most {MAX_IDENTITY_BYTES} are allowed")
    if identity != identity.strip():
        raise ValueError("the identity starts or ends with a space")
    if identity.startswith(_COMMENT) or b":" in identity:
        raise ValueError("the identity starts with # or ;, or has a colon")
    try:
        text = identity.decode()
    except UnicodeDecodeError:
        raise ValueError("the identity is not UTF-8") from None
    if not text.isprintable():
        raise ValueError("the identity has a character that is not printable")


def shown_identity(identity: bytes) -> str:
    """An identity that is safe in a message or a log, whatever a client sent."""
    text = identity[: MAX_IDENTITY_BYTES + 1].decode(errors="backslashreplace")
    return "'" + "".join(c if c.isprintable() else shown(c) for c in text) + "'"


def _parse_key(text: bytes) -> bytes:
    if not _HEX.fullmatch(text):
        raise ValueError("the key is not an even number of hexadecimal digits")
    bits = len(text) * 4
    if bits < MIN_KEY_BITS:
        raise ValueError(f"the key has {bits} bits; at least {MIN_KEY_BITS} are needed (draft section 3)")
    if bits > MAX_KEY_BITS:
        raise ValueError(f"the key has {bits} bits; at most {MAX_KEY_BITS} are allowed")
    return bytes.fromhex(text.decode())
