"""``skipctl psk add|list|remove``: the file of TLS pre-shared keys, and the lines to paste into a router.

Keys have 256 bits from the operating system. The file is replaced in one step, so that a running api or stunnel never
reads half of it; comments stay. A key is shown once, when it is made, because the router needs it; ``list`` shows none.
"""

from __future__ import annotations

import argparse
import fcntl
import ipaddress
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from skipbus.ctl.command import Commands, add_command, add_group
from skipbus.shared.errors import OperatorError
from skipbus.shared.protocol.psk_file import entries, parse_entry, read_psk_file, shown_identity, validate_identity
from skipbus.shared.settings import load_settings

_KEY_BYTES = 32
_DEFAULT_PORT = 8443
_PROFILE = "SKIP"


def register(commands: Commands) -> None:
    """Add `psk` and its subcommands."""
    group = add_group(commands, "psk", "the pre-shared keys of encryptors")
    add = add_command(group, "add", "make a key for an encryptor, and print what its router needs", _add)
    add.add_argument("identity", help="the encryptor's PSK identity, 1 to 127 bytes")
    add.add_argument("--server", default="<address>", help="this key provider's address, for the router's lines")
    add.add_argument("--port", type=int, default=None, help=f"its TLS port (default SKIP_TLS_PORT or {_DEFAULT_PORT})")
    shown = add_command(group, "list", "list the identities and the lengths of their keys", _list)
    remove = add_command(group, "remove", "remove an encryptor's key", _remove)
    remove.add_argument("identity", help="the identity as `skipctl psk list` shows it")
    for parser in (add, shown, remove):
        parser.add_argument("--file", type=Path, default=None, help="the file (default SKIP_TLS_PSK_FILE)")


def _add(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    path, port = _file_and_port(arguments, environ)
    identity = os.fsencode(arguments.identity)
    try:
        validate_identity(identity)
    except ValueError as error:
        raise OperatorError(str(error)) from error
    key = secrets.token_bytes(_KEY_BYTES)
    with _locked(path):
        if identity in (read_psk_file(path) if path.exists() else {}):
            raise OperatorError(f"{path} has a key for {shown_identity(identity)} already; remove it first")
        before = path.read_bytes() if path.exists() else b""
        if before and not before.endswith(b"\n"):
            before += b"\n"
        _replace(path, before + identity + b":" + key.hex().encode() + b"\n")
    print(f"added {shown_identity(identity)} to {path}; a running api takes it up within seconds\n")
    print("\n".join(router_lines(arguments.identity, key, arguments.server, arguments.port or port)))
    return 0


def router_lines(identity: str, key: bytes, server: str, port: int) -> list[str]:
    """The lines for IOS XE, in configuration mode."""
    return [
        "! IOS XE, in configuration mode. The key is shown this once.",
        f"crypto skip-client {_PROFILE}",
        f" server {_server_keyword(server)} {server} port {port}",
        f" psk id {identity} key hex {key.hex()}",
    ]


def _server_keyword(server: str) -> str:
    try:
        return f"ipv{ipaddress.ip_address(server).version}"
    except ValueError:
        return "fqdn"


def _list(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    path, _ = _file_and_port(arguments, environ)
    for identity, key in read_psk_file(path).items():
        print(f"{shown_identity(identity).strip(chr(39))}  {len(key) * 8} bits")
    return 0


def _remove(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    path, _ = _file_and_port(arguments, environ)
    identity = os.fsencode(arguments.identity)
    with _locked(path):
        if identity not in read_psk_file(path):
            raise OperatorError(f"{path} has no key for {shown_identity(identity)}")
        octets = path.read_bytes()
        (gone,) = (number for number, line in entries(octets) if parse_entry(line)[0] == identity)
        lines = octets.split(b"\n")
        _replace(path, b"\n".join(lines[: gone - 1] + lines[gone:]))
    print(f"removed {shown_identity(identity)} from {path}")
    print("connections that it has now stay until they end")
    return 0


def _file_and_port(arguments: argparse.Namespace, environ: Mapping[str, str]) -> tuple[Path, int]:
    if arguments.file is not None:
        port = environ.get("SKIP_TLS_PORT", "")
        return arguments.file, int(port) if port.isascii() and port.isdigit() else _DEFAULT_PORT
    tls = load_settings(environ).tls
    if not tls.psk_files:
        raise OperatorError("no file of pre-shared keys is configured: set SKIP_TLS_PSK_FILE, or give --file")
    return tls.psk_files[0], tls.port


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One skipctl at a time: the folder is locked, because the file itself is replaced."""
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise OperatorError(f"{path.parent}: {error.strerror}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _replace(path: Path, octets: bytes) -> None:
    """Replaces the file in one step, with its owner and mode; only its owner can read a new one."""
    real = path.resolve()
    draft = real.with_name(f".{real.name}.new")
    draft.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            if real.exists():
                found = real.stat()
                os.fchown(file.fileno(), found.st_uid, found.st_gid)
                os.fchmod(file.fileno(), found.st_mode & 0o770)
            file.write(octets)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(real)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OperatorError(f"{path} cannot be written ({error.strerror})") from error
