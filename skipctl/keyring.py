"""``skipctl keyring init|take|show``: makes a KP's keyring once, moves one that was made elsewhere, or shows it.

No command shows a private key.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from skipbus.ctl.command import Commands, add_command, add_group
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.identity import fingerprint
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.settings import load_settings


def register(commands: Commands) -> None:
    """Adds `keyring` and its subcommands."""
    group = add_group(commands, "keyring", "the key provider's own private keys")
    init = add_command(group, "init", "make a new identity in an empty folder", _init)
    init.add_argument("--if-missing", action="store_true", help="do nothing if the keyring of this key provider exists")
    take = add_command(group, "take", "move a keyring from another folder, and destroy it there", _take)
    take.add_argument("source", type=Path, help="the folder of the keyring")
    add_command(group, "show", "show the identity and the live epochs", _show)


def _init(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    settings = load_settings(environ)
    # Any content counts as a keyring: an operator restores a damaged one, it is never replaced.
    if arguments.if_missing and settings.keyring_dir.is_dir() and any(settings.keyring_dir.iterdir()):
        keyring = Keyring.open(settings.keyring_dir, settings.local_system_id)
        print(f"the keyring of {keyring.system_id} exists: identity {fingerprint(keyring.identity.public_key)}")
        return 0
    keyring = Keyring.create(settings.keyring_dir, settings.local_system_id)
    print(f"made a keyring for {keyring.system_id} in {keyring.path}")
    print(f"identity {fingerprint(keyring.identity.public_key)}")
    return 0


def _take(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    settings = load_settings(environ)
    keyring = Keyring.take(arguments.source, settings.keyring_dir, settings.local_system_id)
    print(f"the keyring of {keyring.system_id} is in {keyring.path}, and nowhere else")
    print(f"identity {fingerprint(keyring.identity.public_key)}")
    return 0


def _show(_arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    settings = load_settings(environ)
    keyring = Keyring.open(settings.keyring_dir, settings.local_system_id)
    print(f"key provider {keyring.system_id}")
    print(f"keyring      {keyring.path}")
    print(f"identity     {fingerprint(keyring.identity.public_key)}")
    epochs = sorted((keyring.read_epoch(i) for i in keyring.epoch_ids()), key=lambda epoch: epoch.span.starts_ms)
    for epoch in epochs:
        span = epoch.span
        state = "now" if span.starts_ms <= now_ms() < span.ends_ms else "ended" if span.ends_ms <= now_ms() else "ahead"
        print(
            f"epoch        {epoch.epoch_id.hex()}  {_utc(span.starts_ms)} to {_utc(span.ends_ms)}, "
            f"destroyed at {_utc(span.destroy_ms)}  {state}"
        )
    return 0


def _utc(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
