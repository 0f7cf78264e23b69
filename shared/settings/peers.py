"""The `[[peers]]` tables of the TOML file: what a table may hold, and the frozen settings that come of it.

Rules: a peer is named by its exact id. Keys travel over a bus only to a peer whose identity is configured. Every
problem of every table is reported, each with its fix, and a table with a problem gives no peer.
"""

from __future__ import annotations

import base64
import fnmatch
import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA87PublicKey

from skipbus.shared.crypto.identity import fingerprint
from skipbus.shared.protocol.system_ids import validate_system_id
from skipbus.shared.settings.values import read_regular_file, shown, suggestion

Link = Literal["store", "bus"]

DEFAULT_STOCK = 64
MAX_STOCK = 100_000
_MAX_ENDPOINT_LENGTH = 255
_MAX_ALLOW_PATTERN = 256
_IDENTITY_PREFIX = "mldsa87:"


@dataclass(frozen=True)
class PeerSettings:
    """One peer. `identity` is its raw ML-DSA-87 public key; a peer over a bus always has one.

    `endpoint` is a base URL without a slash at its end. `allow` has patterns of callers' identities that may ask for
    keys with this peer; None is any caller.
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
    """A public key as a configuration has it: `mldsa87:` and base64."""
    return _IDENTITY_PREFIX + base64.b64encode(public_key).decode()


def parse_identity_line(line: str) -> bytes:
    """The raw public key of `identity_line`. Raises ValueError with a sentence."""
    try:
        public_key = base64.b64decode(line.removeprefix(_IDENTITY_PREFIX), validate=True)
        MLDSA87PublicKey.from_public_bytes(public_key)
    except ValueError:
        raise ValueError("it is not a whole ML-DSA-87 public key in base64") from None
    return public_key


def peer_block(system_id: str, public_key: bytes, link: Link = "bus") -> str:
    """A key provider's own `[[peers]]` table, to be pasted into the TOML file of the other side."""
    escaped = system_id.replace("\\", "\\\\").replace('"', '\\"')
    return f'[[peers]]\nsystem_id = "{escaped}"\nlink = "{link}"\nidentity = "{identity_line(public_key)}"\n'


def describe_peer(peer: PeerSettings) -> str:
    """One peer in a line, for `skipctl config check`."""
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


def read_peers(tables: object, path: str, local_id: str | None) -> tuple[dict[str, PeerSettings], list[str]]:
    """The peers by id, and a text for every problem. `local_id` is None if that is itself a problem."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        return {}, [f"{path}: peers is not a list of tables. Write [[peers]], with two brackets, above each peer."]
    peers: dict[str, PeerSettings] = {}
    problems: list[str] = []
    for position, table in enumerate(tables, 1):
        found: list[str] = []
        peer = _read_table(table, found)
        found = found or _conflicts(peer, peers, local_id)
        problems.extend(f"{path}: {_name(table, position)}: {problem}" for problem in found)
        if not found:
            peers[peer.system_id] = peer
    return peers, problems


def _name(table: Mapping[str, object], position: int) -> str:
    system_id = table.get("system_id")
    return f'peer "{shown(system_id)}"' if isinstance(system_id, str) and system_id else f"[[peers]] number {position}"


def _read_table(table: Mapping[str, Any], problems: list[str]) -> PeerSettings:
    unknown = (key for key in table if key not in PEER_FIELDS)
    problems.extend(f"{shown(key)} is not a known key. {suggestion(key, PEER_FIELDS)}" for key in unknown)
    values: dict[str, Any] = {"system_id": ""}
    for name, (_, fix, parse) in PEER_FIELDS.items():
        try:
            if name in table:
                values[name] = parse(table[name])
        except ValueError as error:
            problems.append(f"{name}: {error}. {fix}.")
    if values.get("link") == "bus":
        values.setdefault("stock", DEFAULT_STOCK)
    peer = PeerSettings(**values)
    problems.extend(_check_together(peer, table))
    return peer


def _check_together(peer: PeerSettings, table: Mapping[str, object]) -> Iterable[str]:
    if "system_id" not in table:
        yield f"system_id is missing. {PEER_FIELDS['system_id'][1]}."
    if peer.link == "bus" and "identity" not in table:
        yield f'identity is missing, and link = "bus" needs it. {_IDENTITY_FIX}.'
    if peer.link == "store" and peer.stock:
        yield 'stock has no meaning with link = "store". Remove it, or write link = "bus".'
    if peer.endpoint_ca_file is not None and not (peer.endpoint or "").startswith("https:"):
        yield "endpoint_ca_file has no meaning without an https endpoint. Set endpoint, or remove it."


def _conflicts(peer: PeerSettings, others: Mapping[str, PeerSettings], local_id: str | None) -> list[str]:
    """What is wrong with the peer beside the others and this key provider itself."""
    twin = next((o.system_id for o in others.values() if peer.identity and o.identity == peer.identity), None)
    if peer.system_id == local_id:
        return ["this is the key provider's own id. Remove the table: it is for the other ends."]
    if peer.system_id in others:
        return ["there is a table of this system_id already. Remove one of them."]
    if twin is not None:
        # Each could sign in the other's name.
        return [f"identity is that of {twin} too, and no two key providers share one. {_IDENTITY_FIX}."]
    return []


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("it is not a text in quotes")
    return value


def _link(value: object) -> str:
    if value not in ("store", "bus"):
        raise ValueError("it is not a kind of link")
    return str(value)


def _stock(value: object) -> int:
    # bool is a subclass of int: `stock = true` is no number.
    if type(value) is not int or not 0 <= value <= MAX_STOCK:
        raise ValueError(f"it is not a whole number from 0 to {MAX_STOCK}")
    return value


def _allow(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ValueError("it is not a list of patterns of callers' identities")
    if not all(1 <= len(entry) <= _MAX_ALLOW_PATTERN and entry.isprintable() for entry in value):
        raise ValueError(f"a pattern has not 1 to {_MAX_ALLOW_PATTERN} printable characters")
    return tuple(value)


def _identity(value: object) -> bytes:
    text = _text(value).strip()
    return parse_identity_line(text if text.startswith(_IDENTITY_PREFIX) else _identity_in_file(text))


def _identity_in_file(path: str) -> str:
    octets, mode = _file(path)
    # An account that can write the file decides which identity is trusted.
    if mode & 0o002:
        raise ValueError(f"{shown(path)!r} can be written by every user of this host; close it with chmod o-w")
    lines = [line.strip() for line in octets.decode("ascii", errors="replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if len(lines) != 1 or not lines[0].startswith(_IDENTITY_PREFIX):
        raise ValueError(f"{shown(path)!r} does not hold one line that starts with {_IDENTITY_PREFIX}")
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
    if len(text) > _MAX_ENDPOINT_LENGTH or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"it is not a URL of at most {_MAX_ENDPOINT_LENGTH} printable characters")
    try:
        parts = urlsplit(text)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.port == 0:
            raise ValueError  # noqa: TRY301 -- as urlsplit does for what it cannot read
    except ValueError:
        raise ValueError("it is not a URL with a host") from None
    if parts.username is not None or "?" in text or "#" in text:
        raise ValueError("it has a user, a query or a fragment, none of which is used")
    if parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
        raise ValueError("http is for this host alone: between hosts, use TLS, https")
    return text.rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


_IDENTITY_FIX = "Copy the line identity = ... from what `skipctl identity show` prints at the other side"
# For each key of a table: its meaning, the fix for a problem with it, and how it is read.
PEER_FIELDS: Mapping[str, tuple[str, str, Callable[[object], object]]] = {
    "system_id": (
        "the other key provider's exact id; required",
        "Write the other key provider's exact id",
        lambda value: validate_system_id(_text(value)),
    ),
    "link": ('"store" (the default) if both use one database, or "bus"', 'Write "store" or "bus"', _link),
    "identity": (
        "its public key, `mldsa87:…` or a file with that line; required with `bus`",
        _IDENTITY_FIX,
        _identity,
    ),
    "endpoint": (
        "its api, for envelopes by `POST /sync` if no broker link is possible",
        "Write it as https://kp.example:8443",
        _endpoint,
    ),
    "endpoint_ca_file": (
        "authorities in PEM for the endpoint's certificate, instead of the host's",
        "Name a file of certificates in PEM",
        _ca_file,
    ),
    "stock": (
        f"keys to keep at the peer ahead of need, 0 to {MAX_STOCK}; {DEFAULT_STOCK} with `bus`",
        "Write 0 for none",
        _stock,
    ),
    "allow": (
        "a list of patterns of callers' identities that may ask for keys with this peer; without it, every caller may",
        'Write it as ["router-*"], or remove it to allow every caller',
        _allow,
    ),
}
