"""A KP's private keys on its own host: its identity and its live epochs. Never in the store, never on the bus.

One folder: ``keyring.json`` (its owner), ``identity.pem`` (ML-DSA-87, PKCS#8), ``epochs/<epoch id>.json``, and
``pins/``, the peers' public keys (``skipbus.shared.crypto.pins``). Folders have mode 0700 and files 0600, owned by the
user who runs the KP. Only ``skipctl keyring init`` makes a keyring: a new identity that a process made by itself would
be refused by every peer that pinned the old one. An epoch is destroyed by overwrite, fsync, unlink and fsync of the
folder; on copy-on-write storage the overwrite may go elsewhere, so use a plain or an encrypted volume.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipbus.shared.crypto.epochs import EPOCH_ID_BYTES, EpochSpan, PublicEpoch
from skipbus.shared.crypto.hpke import HybridPrivateKey
from skipbus.shared.crypto.identity import Identity, fingerprint
from skipbus.shared.crypto.pins import PinBook, sync_folder, write_flushed
from skipbus.shared.errors import KeyringError

VERSION = 1
# What an operator does about a damaged file.
_RESTORE = "restore it from where it was kept"
_EPOCH_FIX = "delete this file; keys that are sealed to its epoch are lost"
_EPOCH_NAME = re.compile(f"[0-9a-f]{{{2 * EPOCH_ID_BYTES}}}")


@dataclass(frozen=True)
class PrivateEpoch:
    """One epoch with its private half."""

    epoch_id: bytes
    span: EpochSpan
    private_key: HybridPrivateKey

    def public(self) -> PublicEpoch:
        """The public half, for the announcement."""
        return PublicEpoch(self.epoch_id, self.span, self.private_key.public_bytes())


class Keyring:
    """An opened keyring: ``identity`` is in memory, each epoch is read from its file on request."""

    def __init__(self, path: Path, system_id: str, identity: Identity) -> None:
        self.path = path
        self.system_id = system_id
        self.identity = identity
        self.pins = PinBook(path / "pins", path / "keyring.json")
        self._epochs = path / "epochs"

    @classmethod
    def create(cls, path: Path, system_id: str) -> Keyring:
        """Makes a keyring with a new identity in an empty folder. Raises KeyringError."""
        if path.exists() and any(path.iterdir()):
            raise KeyringError(f"{path} is not empty; a keyring is made only in a new or empty folder")
        identity = Identity.generate()
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
        (path / "epochs").mkdir(mode=0o700)
        _write_file(path / "identity.pem", identity.to_pem())
        about = {
            "version": VERSION,
            "system_id": system_id,
            "identity_fingerprint": fingerprint(identity.public_key),
        }
        # Written last: an incomplete keyring has no keyring.json and is refused.
        _write_file(path / "keyring.json", json.dumps(about, indent=2).encode() + b"\n")
        return cls(path, system_id, identity)

    @classmethod
    def open(cls, path: Path, system_id: str) -> Keyring:
        """The keyring of ``system_id``.

        Raises KeyringError if it is missing, damaged, another KP's, or readable by others.
        """
        if not (path / "keyring.json").exists():
            raise KeyringError(
                f"there is no keyring in {path}: restore it from where it was kept, or, for a new key provider only, "
                f"make one with 'skipctl keyring init' (peers that know {system_id} will refuse a new identity)"
            )
        for folder in (path, path / "epochs"):
            _check_mode(folder, 0o700)
        about = _read_json(path / "keyring.json", _RESTORE)
        if about.get("version") != VERSION:
            raise KeyringError(
                f"the keyring in {path} has version {about.get('version')!r}, not {VERSION}: "
                "use the release that made it"
            )
        if about.get("system_id") != system_id:
            raise KeyringError(
                f"the keyring in {path} belongs to {about.get('system_id')!r}, not to {system_id!r}: "
                "correct SKIP_KEYRING_DIR or SKIP_LOCAL_SYSTEM_ID"
            )
        return cls(path, system_id, _read_identity(path, str(about.get("identity_fingerprint"))))

    @classmethod
    def take(cls, source: Path, path: Path, system_id: str) -> Keyring:
        """Moves a keyring from ``source`` into an empty folder, and destroys the files in ``source``.

        It may be called again at any time: an interrupted move continues, and a keyring in its place is not changed.
        Raises KeyringError if neither folder has a keyring, or both have one and they differ.
        """
        if not (path / "keyring.json").exists():
            if not (source / "keyring.json").exists():
                raise KeyringError(
                    f"there is no keyring in {path}, and none to move there in {source}: restore it to {path} from "
                    "where it was kept (other sites know its identity and will refuse a new one)"
                )
            cls.open(source, system_id)
            for folder in (path, path / "epochs"):
                _make_folder(folder)
            for name in _names(source):
                _make_folder((path / name).parent)
                _write_file(path / name, _read_file(source / name))
        kept = cls.open(path, system_id)
        if (source / "keyring.json").exists():
            _destroy_copy(source, kept)
        return kept

    def epoch_ids(self) -> list[bytes]:
        """The ids of all epochs whose private half exists, unordered."""
        names = (path.stem for path in self._epochs.glob("*.json"))
        return [bytes.fromhex(name) for name in names if _EPOCH_NAME.fullmatch(name)]

    def epoch_written_ms(self, epoch_id: bytes) -> int:
        """When (UTC ms) an epoch's file was written, for a file that cannot be read. Raises KeyringError."""
        try:
            return int(self._file(epoch_id).stat().st_mtime * 1000)
        except OSError as error:
            raise KeyringError(f"epoch {epoch_id.hex()} is not in the keyring") from error

    def read_epoch(self, epoch_id: bytes) -> PrivateEpoch:
        """One live epoch. Raises KeyringError if it was destroyed, never existed, or is damaged."""
        path = self._file(epoch_id)
        if not path.exists():
            raise KeyringError(f"epoch {epoch_id.hex()} is not in the keyring (destroyed, or another host's)")
        fields = _read_json(path, _EPOCH_FIX)
        try:
            span = EpochSpan(int(fields["starts_ms"]), int(fields["ends_ms"]), int(fields["destroy_ms"]))
            key = HybridPrivateKey.from_bytes(bytes.fromhex(fields["private_key"]))
        except (KeyError, TypeError, ValueError) as error:
            raise KeyringError(f"{path} is damaged: {_EPOCH_FIX}") from error
        return PrivateEpoch(epoch_id, span, key)

    def write_epoch(self, epoch: PrivateEpoch) -> None:
        """Adds an epoch; it is flushed to disk when this returns."""
        fields = {
            "starts_ms": epoch.span.starts_ms,
            "ends_ms": epoch.span.ends_ms,
            "destroy_ms": epoch.span.destroy_ms,
            "private_key": epoch.private_key.to_bytes().hex(),
        }
        _write_file(self._file(epoch.epoch_id), json.dumps(fields).encode())

    def destroy_epoch(self, epoch_id: bytes) -> None:
        """Overwrites and removes an epoch's private half; this is flushed to disk when this returns."""
        _destroy_file(self._file(epoch_id))

    def _file(self, epoch_id: bytes) -> Path:
        return self._epochs / f"{epoch_id.hex()}.json"


def _names(folder: Path) -> list[str]:
    """The files of a keyring. keyring.json comes last: as long as it exists, the others belong to a keyring."""
    found = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    return sorted(found, key=lambda name: (name == "keyring.json", name))


def _destroy_copy(source: Path, kept: Keyring) -> None:
    """Destroys the files that ``Keyring.take`` has copied. Some may be destroyed already."""
    left, own = (
        str(_read_json(source / "keyring.json", _RESTORE).get("identity_fingerprint")),
        fingerprint(kept.identity.public_key),
    )
    if left != own:
        raise KeyringError(
            f"{kept.path} holds the identity {own}, and {source} another one, {left}: remove the wrong one"
        )
    *secret, public = _names(source)
    for name in secret:
        _destroy_file(source / name)
    (source / public).unlink()
    sync_folder(source)


def check_pinned_identity(keyring: Keyring, pinned_key: bytes | None) -> None:
    """Raises KeyringError if the store has pinned another identity for this KP than the keyring's."""
    if pinned_key is None or pinned_key == keyring.identity.public_key:
        return
    raise KeyringError(
        f"the store knows {keyring.system_id} by the identity {fingerprint(pinned_key)}, but the keyring in "
        f"{keyring.path} holds {fingerprint(keyring.identity.public_key)}: restore the keyring, or, where the new "
        f"one is meant, run 'skipctl identity accept {keyring.system_id}' here and at every peer"
    )


def _read_identity(path: Path, expected: str) -> Identity:
    try:
        identity = Identity.from_pem(_read_file(path / "identity.pem"))
    except ValueError as error:
        raise KeyringError(f"{path / 'identity.pem'} is damaged: {_RESTORE}") from error
    if fingerprint(identity.public_key) != expected:
        raise KeyringError(f"{path / 'identity.pem'} is not the identity that {path / 'keyring.json'} names")
    return identity


def _check_mode(path: Path, wanted: int) -> None:
    try:
        found = path.stat()
    except OSError as error:
        raise KeyringError(f"{path} cannot be read: {error.strerror}") from error
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        raise KeyringError(f"{path} may be read by others (mode {mode:04o}): chmod {wanted:o} {path}")
    if found.st_uid not in (os.geteuid(), 0):
        raise KeyringError(f"{path} belongs to user {found.st_uid}, not to the one who runs this process: chown it")


def _read_file(path: Path) -> bytes:
    _check_mode(path, 0o600)
    try:
        return path.read_bytes()
    except OSError as error:
        raise KeyringError(f"{path} cannot be read: {error.strerror}") from error


def _read_json(path: Path, fix: str) -> dict[str, Any]:
    try:
        value = json.loads(_read_file(path))
    except ValueError as error:
        raise KeyringError(f"{path} is damaged: {fix}") from error
    if not isinstance(value, dict):
        raise KeyringError(f"{path} is damaged: {fix}")
    return value


def _write_file(path: Path, data: bytes) -> None:
    """Writes the whole file or nothing, mode 0600, flushed to disk when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write_flushed(temporary, data)
    temporary.replace(path)
    sync_folder(path.parent)


def _destroy_file(path: Path) -> None:
    """Overwrites and removes a file; this is flushed to disk when this returns."""
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        for filler in (os.urandom(size), bytes(size)):
            file.seek(0)
            file.write(filler)
            file.flush()
            os.fsync(file.fileno())
    path.unlink()
    sync_folder(path.parent)


def _make_folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
