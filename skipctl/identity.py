"""``skipctl identity show|accept``: the own identity, the pinned identities, and accepting a changed one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from skipbus.ctl.command import Commands, add_command, add_group
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.identity import fingerprint
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.crypto.pins import PinBook
from skipbus.shared.errors import KeyringError, OperatorError
from skipbus.shared.protocol.announcements import read_announcement
from skipbus.shared.settings import Settings, load_settings
from skipbus.shared.settings.peers import peer_block
from skipbus.shared.store.announcements import fetch_announcement
from skipbus.shared.store.engine import driver_errors, make_engine
from skipbus.shared.store.pinned_identities import Pin, fetch_pin, fetch_pins, update_pin


def register(commands: Commands) -> None:
    """Adds `identity` and its subcommands."""
    group = add_group(commands, "identity", "show identities, and accept a changed one")
    add_command(group, "show", "print the block for the peers' TOML files, and the pins", _show)
    accept = add_command(group, "accept", "accept the identity that a key provider presents now", _accept)
    accept.add_argument("system_id", help="the key provider whose new identity is accepted")
    accept.add_argument("--fingerprint", help="accept only this fingerprint, which its operator has confirmed")


def _show(_arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    settings = load_settings(environ)
    keyring = _keyring(settings)
    # First, because it needs no store, and the other side's operator waits for it.
    own_id, own_key = settings.local_system_id, keyring.identity.public_key
    print(f"# For the TOML files of the peers of {own_id}, whose fingerprint is {fingerprint(own_key)}")
    print(peer_block(own_id, own_key))
    configured = {k: peer.identity for k, peer in settings.peers.items() if peer.identity}
    with driver_errors(), make_engine(settings.mysql).connect() as connection:
        stored = fetch_pins(connection, settings.local_system_id)
    for system_id in sorted(stored.keys() | configured.keys()):
        _show_pin(system_id, stored.get(system_id), configured.get(system_id), keyring.pins)
    return 0


def _show_pin(system_id: str, stored: Pin | None, configured: bytes | None, pins: PinBook) -> None:
    try:
        believed = configured or pins.get(system_id) or (stored.public_key if stored else b"")
    except KeyringError as error:
        print(f"{system_id}  refused: {error}")
        return
    print(f"{system_id}  {fingerprint(believed)}{'  (configured)' if configured else ''}")
    if stored is not None and configured is None and stored.public_key != believed:
        print(f"  the store was changed, refused: {fingerprint(stored.public_key)}")
    if stored is not None and stored.presented_key not in (None, believed):
        print(f"  presents another one, refused: {fingerprint(stored.presented_key or b'')}")


def _accept(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    settings = load_settings(environ)
    peer = settings.peers.get(arguments.system_id)
    if peer is not None and peer.identity is not None:
        raise OperatorError(f"the identity of {peer.system_id} is configured: change it in {settings.config_file}")
    accepted = _accept_presented(settings, arguments.system_id, arguments.fingerprint)
    print(f"{settings.local_system_id} accepts {fingerprint(accepted)} as {arguments.system_id}")
    return 0


def _accept_presented(settings: Settings, system_id: str, wanted: str | None) -> bytes:
    keyring = _keyring(settings)
    with driver_errors(), make_engine(settings.mysql).begin() as connection:
        pin = fetch_pin(connection, settings.local_system_id, system_id)
        if pin is None:
            raise OperatorError(f"{settings.local_system_id} has never seen {system_id}; nothing is pinned")
        if system_id == settings.local_system_id:
            presented, pinned = keyring.identity.public_key, pin.public_key
        else:
            body = fetch_announcement(connection, system_id)
            presented = read_announcement(body).public_key if body is not None else pin.public_key
            pinned = _pinned(keyring, system_id) or pin.public_key
        if presented == pinned:
            raise OperatorError(f"{system_id} presents no other identity than the pinned one")
        if wanted is not None and wanted != fingerprint(presented):
            raise OperatorError(f"{system_id} presents {fingerprint(presented)}, not {wanted}; nothing was changed")
        update_pin(connection, settings.local_system_id, system_id, presented, now_ms())
    if system_id != settings.local_system_id:
        keyring.pins.replace(system_id, presented)
    return presented


def _pinned(keyring: Keyring, system_id: str) -> bytes | None:
    """A damaged pin equals no identity, so that any presented one can be accepted."""
    try:
        return keyring.pins.get(system_id)
    except KeyringError:
        return b"damaged"


def _keyring(settings: Settings) -> Keyring:
    return Keyring.open(settings.keyring_dir, settings.local_system_id)
