"""Owns the ``[[peers]]`` tables of the TOML file: what may stand in one, and the frozen settings that come of it.

Rules: a peer is named by its exact id; keys travel over a bus only to a peer whose identity stands in the
configuration; every fault of every table is reported, each with its fix, and a table with a fault gives no peer.
Leaves to others: finding the tables (``skipbus.shared.config_sources``) and what they mean together with other options
(``skipbus.shared.config``).
"""

from __future__ import annotations

import base64
import difflib
import fnmatch
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA87PublicKey

from skipbus.shared.config_sources import read_regular_file, shown
from skipbus.shared.crypto.identity import fingerprint
from skipbus.shared.protocol.system_ids import validate_system_id

Link = Literal["store", "bus"]

DEFAULT_STOCK = 64
MAX_STOCK = 100_000
MAX_ENDPOINT_LENGTH = 255
MAX_ALLOW_PATTERN = 256
IDENTITY_PREFIX = "mldsa87:"
_IDENTITY_FIX = "Copy the line identity = ... from what `skipctl identity show` prints at the other side"
_FIELDS = ("system_id", "link", "identity", "endpoint", "endpoint_ca_file", "stock", "allow")
_T = TypeVar("_T")


@dataclass(frozen=True)
class PeerSettings:
    """One peer. ``identity`` is its raw ML-DSA-87 public key; a peer over a bus always has one.

    ``endpoint`` is a base URL without a slash at its end. ``allow`` holds patterns of callers' identities that may
    ask for keys with this peer; None is any caller.
    """

    system_id: str
    link: Link = "store"
    identity: bytes | None = field(default=None, repr=False)
    endpoint: str | None = None
    endpoint_ca_file: Path | None = None
    stock: int = 0
    allow: tuple[str, ...] | None = None

    def allows(self, caller_names: Iterable[str]) -> bool:
        """Whether a caller of these proven names may ask for keys with this peer; one without names may not."""
        if self.allow is None:
            return True
        return any(pattern.match(name) for name in caller_names for pattern in _compiled(self.allow))


@lru_cache(maxsize=1024)
def _compiled(patterns: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(fnmatch.translate(pattern)) for pattern in patterns)


def identity_line(public_key: bytes) -> str:
    """A public key as it stands in a configuration: ``mldsa87:`` and base64."""
    return IDENTITY_PREFIX + base64.b64encode(public_key).decode()


def parse_identity_line(line: str) -> bytes:
    """The raw public key of ``identity_line``; ValueError with a sentence where it is none."""
    try:
        public_key = base64.b64decode(line.removeprefix(IDENTITY_PREFIX), validate=True)
        MLDSA87PublicKey.from_public_bytes(public_key)
    except ValueError:
        raise ValueError("it is not a whole ML-DSA-87 public key in base64") from None
    return public_key


def peer_block(system_id: str, public_key: bytes, link: Link = "bus") -> str:
    """A KP's own ``[[peers]]`` table, as the other side pastes it into its TOML file."""
    head = f'[[peers]]\nsystem_id = "{_escaped(system_id)}"\nlink = "{link}"\n'
    return f'{head}identity = "{identity_line(public_key)}"\n'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def read_peers(tables: object, path: str, local_id: str | None) -> tuple[dict[str, PeerSettings], list[str]]:
    """The peers by id, and a text for every problem. ``local_id`` is None where that is itself a problem."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        return {}, [f"{path}: peers is not a list of tables. Write [[peers]], with two brackets, above each peer."]
    peers: dict[str, PeerSettings] = {}
    problems: list[str] = []
    for position, table in enumerate(tables, 1):
        reader = _Table(table, f"{path}: {_name(table, position)}", problems)
        if (peer := _peer(reader)) is not None and _fits(peer, peers, local_id, reader):
            peers[peer.system_id] = peer
    return peers, problems


def _name(table: Mapping[str, object], position: int) -> str:
    system_id = table.get("system_id")
    return f'peer "{shown(system_id)}"' if isinstance(system_id, str) and system_id else f"[[peers]] number {position}"


class _Table:
    """One ``[[peers]]`` table on its way to a ``PeerSettings``: reads fields and notes problems."""

    def __init__(self, table: Mapping[str, Any], name: str, problems: list[str]) -> None:
        self.table = table
        self.name = name
        self._problems = problems
        self.faulty = False

    def problem(self, text: str) -> None:
        """Notes a problem of this table."""
        self.faulty = True
        self._problems.append(f"{self.name}: {text}")

    def read(self, key: str, parse: Callable[[Any], _T], default: _T, fix: str) -> _T:
        """The field's value; the default where it is missing or has a problem."""
        if key not in self.table:
            return default
        try:
            return parse(self.table[key])
        except ValueError as error:
            self.problem(f"{key}: {error}. {fix}.")
            return default


def _peer(reader: _Table) -> PeerSettings | None:
    for text in _unknown(reader.table):
        reader.problem(text)
    if "system_id" not in reader.table:
        reader.problem("system_id is missing. Write the other key provider's exact id.")
    system_id = reader.read("system_id", _system_id, "", "Write the other key provider's exact id")
    store: Link = "store"
    link = reader.read("link", _link, store, 'Write "store" or "bus"')
    peer = PeerSettings(
        system_id=system_id,
        link=link,
        identity=reader.read("identity", _identity, None, _IDENTITY_FIX),
        endpoint=reader.read("endpoint", _endpoint, None, "Write it as https://kp.example:8443"),
        endpoint_ca_file=reader.read("endpoint_ca_file", _ca_file, None, "Name a file of certificates in PEM"),
        stock=reader.read("stock", _stock, DEFAULT_STOCK if link == "bus" else 0, "Write 0 for none"),
        allow=reader.read("allow", _allow, None, 'Write it as ["router-*"], or remove it to allow every caller'),
    )
    _check_together(peer, reader)
    return None if reader.faulty else peer


def _unknown(table: Mapping[str, object]) -> Iterator[str]:
    for key in table:
        if key not in _FIELDS:
            near = difflib.get_close_matches(key, _FIELDS, n=1, cutoff=0.6)
            yield f"{shown(key)} is not a known key. {f'Did you mean {near[0]}?' if near else 'Remove it.'}"


def _check_together(peer: PeerSettings, reader: _Table) -> None:
    if peer.link == "bus" and "identity" not in reader.table:
        reader.problem(f'identity is missing, and link = "bus" needs it. {_IDENTITY_FIX}.')
    if peer.link == "store" and peer.stock:
        reader.problem('stock has no meaning with link = "store". Remove it, or write link = "bus".')
    if peer.endpoint_ca_file is not None and not (peer.endpoint or "").startswith("https:"):
        reader.problem("endpoint_ca_file has no meaning without an https endpoint. Set endpoint, or remove it.")


def _fits(peer: PeerSettings, others: Mapping[str, PeerSettings], local_id: str | None, reader: _Table) -> bool:
    """Whether the peer is neither this KP itself nor told twice."""
    twin = next((o.system_id for o in others.values() if peer.identity and o.identity == peer.identity), None)
    if peer.system_id == local_id:
        reader.problem("this is the key provider's own id. Remove the table: it is for the other ends.")
    elif peer.system_id in others:
        reader.problem("there is a table of this system_id already. Remove one of them.")
    elif twin is not None:
        # Each could sign in the other's name.
        reader.problem(f"identity is that of {twin} too, and no two key providers share one. {_IDENTITY_FIX}.")
    return not reader.faulty


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("it is not a text in quotes")
    return value


def _system_id(value: object) -> str:
    return validate_system_id(_text(value))


def _link(value: object) -> Link:
    if value == "store":
        return "store"
    if value == "bus":
        return "bus"
    raise ValueError("it is not a kind of link")


def _stock(value: object) -> int:
    # bool is a subclass of int: `stock = true` is no number.
    if type(value) is not int or not 0 <= value <= MAX_STOCK:
        raise ValueError(f"it is not a whole number from 0 to {MAX_STOCK}")
    return value


def _allow(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ValueError("it is not a list of patterns of callers' identities")
    for entry in value:
        if not 1 <= len(entry) <= MAX_ALLOW_PATTERN or not entry.isprintable():
            raise ValueError(f"a pattern has not 1 to {MAX_ALLOW_PATTERN} printable characters")
    return tuple(value)


def _identity(value: object) -> bytes:
    text = _text(value).strip()
    return parse_identity_line(text if text.startswith(IDENTITY_PREFIX) else _identity_in_file(text))


def _identity_in_file(path: str) -> str:
    octets, mode = _file(path)
    # Whoever may write the file decides whom this KP believes.
    if mode & 0o002:
        raise ValueError(f"{shown(path)!r} can be written by every user of this host; close it with chmod o-w")
    lines = [line.strip() for line in octets.decode("ascii", errors="replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if len(lines) != 1 or not lines[0].startswith(IDENTITY_PREFIX):
        raise ValueError(f"{shown(path)!r} does not hold one line that starts with {IDENTITY_PREFIX}")
    return lines[0]


def _ca_file(value: object) -> Path:
    path = _text(value)
    if b"-----BEGIN CERTIFICATE-----" not in _file(path)[0]:
        raise ValueError(f"{shown(path)!r} holds no certificate in PEM")
    return Path(path).absolute()


def _file(path: str) -> tuple[bytes, int]:
    if "\0" in path:
        raise ValueError("the path holds a NUL")
    try:
        return read_regular_file(path)
    except OSError as error:
        raise ValueError(f"{shown(path)!r} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{shown(path)!r} {str(error).split('. ')[0]}") from None


def _endpoint(value: object) -> str:
    text = _text(value)
    if len(text) > MAX_ENDPOINT_LENGTH or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"it is not a URL of at most {MAX_ENDPOINT_LENGTH} printable characters")
    try:
        parts = urlsplit(text)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise ValueError("it is not a URL with a host") from None
    if not usable:
        raise ValueError("it is not a URL with a host")
    if parts.username is not None or "?" in text or "#" in text:
        raise ValueError("it has a user, a query or a fragment, none of which is used")
    if parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
        raise ValueError("http is for this host alone: a line between hosts is to be TLS")
    return text.rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def describe_peer(peer: PeerSettings) -> str:
    """One peer in a line, as ``skipctl config check`` shows it."""
    parts = [f"link {peer.link}", f"identity {fingerprint(peer.identity) if peer.identity else 'learned'}"]
    if peer.endpoint:
        parts.append(f"endpoint {peer.endpoint}")
    if peer.endpoint_ca_file:
        parts.append(f"endpoint_ca_file {peer.endpoint_ca_file}")
    if peer.link == "bus":
        parts.append(f"stock {peer.stock}")
    if peer.allow is not None:
        parts.append(f"allow {', '.join(peer.allow) or 'nobody'}")
    return "; ".join(parts)
