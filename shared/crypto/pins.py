"""The identities that this KP has pinned, in its keyring: one small file for each key provider.

The store shows the pins to operators but does not decide: an attacker who can write to MySQL could replace a pin and
an announcement together and have keys sealed to himself. A pin stays until an operator changes it with
``skipctl identity accept``.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from skipbus.shared.crypto.identity import PUBLIC_KEY_BYTES
from skipbus.shared.errors import KeyringError


class PinBook:
    """Pinned public keys (raw ML-DSA-87) by system id."""

    def __init__(self, folder: Path, keyring_file: Path | None = None) -> None:
        """Nothing is written if ``keyring_file`` is missing: a folder with pins alone would look like a keyring."""
        self._folder = folder
        self._keyring_file = keyring_file

    def get(self, system_id: str) -> bytes | None:
        """The pinned key, or None. Raises KeyringError for a damaged file."""
        path = self._file(system_id)
        try:
            return _read(path.read_bytes(), system_id)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise KeyringError(
                f"the pin of {system_id} in {path} cannot be read: restore it, or compare fingerprints "
                f"with its operator and run 'skipctl identity accept {system_id} --fingerprint ...'"
            ) from error

    def learn(self, system_id: str, public_key: bytes) -> bytes:
        """Pins on first use, and returns the pinned key: another one if another process was first."""
        path = self._file(system_id)
        temporary = self._written(path, system_id, public_key)
        try:
            # A link fails if the name exists, and a reader never sees half a file.
            os.link(temporary, path)
            sync_folder(self._folder)
        except FileExistsError:
            pass
        except OSError as error:
            raise KeyringError(f"the pin of {system_id} cannot be written to {path}: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)
        pinned = self.get(system_id)
        if pinned is None:
            raise KeyringError(f"the pin of {system_id} is gone from {path}")
        return pinned

    def replace(self, system_id: str, public_key: bytes) -> None:
        """Pins this key because an operator accepted it. Raises KeyringError."""
        path = self._file(system_id)
        self._written(path, system_id, public_key).replace(path)
        sync_folder(self._folder)

    def _written(self, path: Path, system_id: str, public_key: bytes) -> Path:
        if self._keyring_file is not None and not self._keyring_file.exists():
            raise KeyringError(f"the pin of {system_id} is not written: the keyring is gone from {self._folder.parent}")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
        text = json.dumps({"system_id": system_id, "public_key": public_key.hex()})
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            write_flushed(temporary, text.encode())
        except OSError as error:
            raise KeyringError(f"the pin of {system_id} cannot be written to {path}: {error.strerror}") from error
        return temporary

    def _file(self, system_id: str) -> Path:
        return self._folder / f"{hashlib.sha384(system_id.encode()).hexdigest()[:32]}.json"


def _read(text: bytes, system_id: str) -> bytes:
    fields = json.loads(text)
    public_key = bytes.fromhex(fields["public_key"])
    # A file that lost its content, or was copied from another peer's, must not count as a pin.
    if len(public_key) != PUBLIC_KEY_BYTES or fields["system_id"] != system_id:
        raise ValueError("not a pin of this key provider")
    return public_key


def write_flushed(path: Path, data: bytes) -> None:
    """Writes a file of mode 0600; its content is on disk when this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flushes a folder: a file's name is durable only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
