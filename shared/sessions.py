"""Session keys: what an envelope is authenticated by where a signature of its own would be what somebody waits for.

A session key is 384 random bits, made by one syncer for one peer and one of the peer's epochs. As a wrapping key it is
sealed to the epoch by HPKE and signed once by its maker; each envelope under it then costs one HMAC-SHA-384. It opens
nothing: whoever learns one can speak in its maker's name to this one peer until the epoch is destroyed, and the peer
itself is the only one besides the maker who knows it.

Every envelope carries its session key, sealed and signed, so that any process of the peer's can read it, whatever
was restarted. ``SessionMaker`` keeps those that are in use, ``SessionBook`` those that were opened. Both may be used
by several threads.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.hmac import HMAC

from skipbus.shared.crypto import hpke
from skipbus.shared.crypto.epochs import EPOCH_ID_BYTES, PublicEpoch, current_epoch
from skipbus.shared.crypto.identity import CONTEXT_SESSION_KEY, Identity, verify
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.errors import EnvelopeRefused, KeyringError, SealBroken, TakesLong
from skipbus.shared.logs import get_logger
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.announcements import Announcement
from skipbus.shared.protocol.envelopes import SESSION_VERSION, Header, SignedEnvelope, session_envelope

KEY_BYTES = 48
MAC_BYTES = 48
MAX_SESSION_BYTES = 8 * 1024
# Of envelopes that a peer may yet say that it could not read.
_NUMBERS_KEPT = 256
_LABEL = b"skipbus session key 1"
_MAX_TIME_MS = 2**63
_KEPT_OF_PEER = 8

_log = get_logger("sessions")


class SessionKey:
    """An opened session key: ``mac`` makes an authenticator of 48 bytes, ``check`` compares one."""

    __slots__ = ("_secret", "expires_ms")

    def __init__(self, secret: bytes, expires_ms: int) -> None:
        if len(secret) != KEY_BYTES:
            raise SealBroken("a session key has another length than it should")
        self._secret = secret
        self.expires_ms = expires_ms

    def __repr__(self) -> str:
        return "<SessionKey ***>"

    def mac(self, data: bytes) -> bytes:
        """HMAC-SHA-384 over ``data``."""
        return self._hmac(data).finalize()

    def check(self, mac: bytes, data: bytes) -> None:
        """Returns where ``mac`` is the one over ``data``; raises SealBroken otherwise. In constant time."""
        try:
            self._hmac(data).verify(mac)
        except InvalidSignature as error:
            raise SealBroken("the authenticator does not verify") from error

    def _hmac(self, data: bytes) -> HMAC:
        hmac = HMAC(self._secret, SHA384())
        hmac.update(data)
        return hmac


def _binding(source_id: str, target_id: str, epoch_id: bytes, expires_ms: int) -> bytes:
    """What the HPKE seal is bound to, and the signature with it."""
    return _LABEL + encoding.pack([source_id, target_id, epoch_id, expires_ms])


def make_session_key(
    identity: Identity, source_id: str, target_id: str, epoch: PublicEpoch
) -> tuple[SessionKey, bytes]:
    """A fresh session key of ``source_id`` for one epoch of ``target_id``, and what goes into its envelopes.

    Raises SealBroken where the epoch's public key is no valid one.
    """
    secret, expires_ms = secrets.token_bytes(KEY_BYTES), epoch.span.destroy_ms
    binding = _binding(source_id, target_id, epoch.epoch_id, expires_ms)
    sealed = hpke.seal(secret, epoch.public_key, binding)
    signature = identity.sign(binding + sealed, CONTEXT_SESSION_KEY)
    return SessionKey(secret, expires_ms), encoding.pack([epoch.epoch_id, expires_ms, sealed, signature])


@dataclass(frozen=True, slots=True)
class _InUse:
    """Made for this epoch of the peer that had this identity; ``numbers`` are of the last envelopes under it."""

    epoch: PublicEpoch
    public_key: bytes
    key: SessionKey
    sealed: bytes
    numbers: deque[int] = field(default_factory=lambda: deque(maxlen=_NUMBERS_KEPT))


class SessionMaker:
    """The session keys of one syncer, one for each peer. ``find`` gives a peer's announcement, where it is trusted."""

    def __init__(self, local_id: str, identity: Identity, find: Callable[[str], Announcement | None]) -> None:
        self._local_id = local_id
        self._identity = identity
        self._find = find
        self._lock = Lock()
        self._in_use: dict[str, _InUse] = {}
        # By the peer's announcement, so that it is tried again when there is another one.
        self._resting: dict[str, int] = {}

    def note_unread(self, peer_id: str, number: int) -> None:
        """The peer is said to have refused this envelope for its session key, which proves nothing.

        If it was sent under one, the peer is sent signatures until it announces itself anew: its epochs change then, or
        its release has. Whoever says so of others, or of what never was, changes nothing.
        """
        announcement = self._find(peer_id)
        with self._lock:
            in_use = self._in_use.get(peer_id)
            if in_use is None or announcement is None or number not in in_use.numbers:
                return
            del self._in_use[peer_id]
            self._resting[peer_id] = announcement.issued_ms
        _log.warning("session keys not read: signatures are sent until the peer announces itself anew", peer=peer_id)

    def envelope(self, header: Header, payload: bytes, *, make: bool = True) -> bytes | None:
        """The envelope under the target's session key; None where it has to be signed.

        The first one for an epoch takes the time of a signature: without ``make`` it has to be signed, too.
        """
        announcement = self._find(header.target)
        if announcement is None or SESSION_VERSION not in announcement.envelope_versions:
            return None
        in_use = self._used(announcement, header.date_ms)
        if in_use is None and make:
            in_use = self._made(announcement, header.date_ms)
        if in_use is None:
            return None
        with self._lock:
            in_use.numbers.append(header.number)
        return session_envelope(header, payload, in_use.key.mac, in_use.sealed)

    def _used(self, announcement: Announcement, at_ms: int) -> _InUse | None:
        in_use = self._in_use.get(announcement.system_id)
        if in_use is None or in_use.public_key != announcement.public_key:
            return None
        return in_use if in_use.epoch == current_epoch(announcement.epochs, at_ms) else None

    def _made(self, announcement: Announcement, at_ms: int) -> _InUse | None:
        peer_id, epoch = announcement.system_id, current_epoch(announcement.epochs, at_ms)
        if epoch is None or self._resting.get(peer_id) == announcement.issued_ms:
            return None
        try:
            # Nobody waits for this: another thread may make one as well, and either will do.
            made = make_session_key(self._identity, self._local_id, peer_id, epoch)
        except SealBroken as error:
            _log.warning("no session key can be made: signatures are sent instead", peer=peer_id, reason=str(error))
            self._resting[peer_id] = announcement.issued_ms
            return None
        with self._lock:
            in_use = self._in_use[peer_id] = _InUse(epoch, announcement.public_key, *made)
        return in_use


class SessionBook:
    """The session keys that peers have sent to one KP, opened. What was verified and opened once is remembered.

    A few for each peer: several syncers of its have one each, and the next epoch brings another.
    """

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring
        self._lock = Lock()
        self._opened: dict[str, OrderedDict[bytes, SessionKey]] = {}

    def check(self, envelope: SignedEnvelope, sender_public_key: bytes, now_ms: int, *, quickly: bool = False) -> None:
        """Returns where the envelope is authenticated by a session key that its sender's identity has signed.

        Raises EnvelopeRefused: malformed, bad_signature, unknown_session; with ``quickly`` TakesLong where the session
        key is not open.
        """
        mac, session = _read_proof(envelope)
        key = self._open(envelope.header, session, sender_public_key, quickly=quickly)
        if key.expires_ms <= now_ms:
            self._forget_ended(now_ms)
            raise _unknown(envelope.header, "it has ended")
        try:
            key.check(mac, envelope.signed_bytes())
        except SealBroken as error:
            raise EnvelopeRefused(
                "bad_signature", f"an envelope from {envelope.header.sender} does not fit its session key"
            ) from error

    def _open(self, header: Header, session: bytes, sender_public_key: bytes, *, quickly: bool) -> SessionKey:
        known = _place_in_book(header, session, sender_public_key)
        with self._lock:
            of_peer = self._opened.get(header.sender)
            key = of_peer.get(known) if of_peer is not None else None
        if key is not None:
            return key
        if quickly:
            raise TakesLong
        key = self._open_anew(header, session, sender_public_key)
        with self._lock:
            # Only now: the name of a sender that is no peer's never gets here.
            of_peer = self._opened.setdefault(header.sender, OrderedDict())
            of_peer[known] = key
            if len(of_peer) > _KEPT_OF_PEER:
                of_peer.popitem(last=False)
        return key

    def _forget_ended(self, now_ms: int) -> None:
        with self._lock:
            for of_peer in self._opened.values():
                for ended in [known for known, key in of_peer.items() if key.expires_ms <= now_ms]:
                    del of_peer[ended]

    def _open_anew(self, header: Header, session: bytes, sender_public_key: bytes) -> SessionKey:
        epoch_id, expires_ms, sealed, signature = _read_session(session)
        binding = _binding(header.sender, header.target, epoch_id, expires_ms)
        try:
            verify(sender_public_key, signature, binding + sealed, CONTEXT_SESSION_KEY)
        except SealBroken as error:
            raise EnvelopeRefused("bad_signature", f"a session key is not signed by {header.sender}") from error
        try:
            epoch = self._keyring.read_epoch(epoch_id)
            if expires_ms > epoch.span.destroy_ms:
                raise _unknown(header, "it would outlive its epoch")
            return SessionKey(epoch.private_key.open(sealed, binding), expires_ms)
        except (KeyringError, SealBroken) as error:
            raise _unknown(header, str(error)) from error


def _place_in_book(header: Header, session: bytes, sender_public_key: bytes) -> bytes:
    # Each part is packed with its length: none can take an octet of its neighbour's.
    return hashlib.sha384(encoding.pack([header.sender, header.target, sender_public_key, session])).digest()


def _unknown(header: Header, why: str) -> EnvelopeRefused:
    return EnvelopeRefused("unknown_session", f"a session key of {header.sender} cannot be used: {why}")


def _read_proof(envelope: SignedEnvelope) -> tuple[bytes, bytes]:
    try:
        mac, session = encoding.unpack(envelope.proof, max_items=2)
        _require(isinstance(mac, bytes) and len(mac) == MAC_BYTES)
        _require(isinstance(session, bytes) and len(session) <= MAX_SESSION_BYTES)
    except (ValueError, TypeError) as error:
        raise EnvelopeRefused("malformed", "an envelope's proof is malformed") from error
    return mac, session


def _read_session(session: bytes) -> tuple[bytes, int, bytes, bytes]:
    try:
        fields: list[Any] = encoding.unpack(session, max_items=4)
        epoch_id, expires_ms, sealed, signature = fields
        _require(isinstance(epoch_id, bytes) and len(epoch_id) == EPOCH_ID_BYTES)
        _require(type(expires_ms) is int and 0 < expires_ms < _MAX_TIME_MS)
        _require(isinstance(sealed, bytes) and isinstance(signature, bytes))
    except (ValueError, TypeError) as error:
        raise EnvelopeRefused("malformed", "a session key is malformed") from error
    return epoch_id, expires_ms, sealed, signature


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError("session")
