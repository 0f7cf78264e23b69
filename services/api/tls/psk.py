"""Pre-shared keys in the handshake: three OpenSSL callbacks, one set for the whole process.

TLS 1.2 asks for a key by its identity. TLS 1.3 asks for a session, which is for one key and one hash; the client has
fixed the hash by its binder. So the ClientHello is read first, and the suite chosen to fit it:
``TLS_AES_256_GCM_SHA384`` for a binder of 48 bytes (draft Table 1), suites with SHA-256 for a binder of 32 bytes
(stunnel as a client, ``openssl s_client -psk``). No exception may pass through C, and nothing may be freed that C still
uses: the callbacks catch everything and live as long as the module.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from skipbus.services.api.tls.handshake import TlsContext, TlsObject, current
from skipbus.services.api.tls.openssl import (
    TLS_1_3,
    ClientHelloCallback,
    FindSessionCallback,
    PskServerCallback,
    context_pointer,
    library,
)
from skipbus.shared.protocol.psk_file import shown_identity

_PRE_SHARED_KEY = 41
_ILLEGAL_PARAMETER, _UNKNOWN_PSK_IDENTITY = 47, 115
# Clients offer one or two. OpenSSL asks for each in turn, and a ClientHello has room for nine thousand, which would
# block the event loop for a tenth of a second.
_MAX_OFFERED = 16
_SUCCESS, _FAILURE = 1, 0
# By the length of the binder: the suites that the connection may use, and the suite of the session.
_SUITES = {
    48: (b"TLS_AES_256_GCM_SHA384", b"\x13\x02"),
    32: (b"TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256", b"\x13\x01"),
}


@dataclass(frozen=True, slots=True)
class OfferedPsk:
    """One entry of the pre_shared_key extension (RFC 8446, 4.2.11)."""

    identity: bytes
    ticket_age: int
    binder_bytes: int


def install(context: TlsContext) -> None:
    """Makes the context serve pre-shared keys in TLS 1.2 and 1.3."""
    pointer = context_pointer(context)
    library().SSL_CTX_set_client_hello_cb(pointer, _ON_CLIENT_HELLO, None)
    library().SSL_CTX_set_psk_server_callback(pointer, _ON_PSK_1_2)
    library().SSL_CTX_set_psk_find_session_callback(pointer, _ON_PSK_1_3)


def install_standard(context: TlsContext) -> None:
    """The same for TLS 1.2 only, by the standard library (Python 3.13 and later)."""
    context.set_psk_server_callback(_standard_callback, None)  # type: ignore[attr-defined]


def parse_offered(extension: bytes) -> Iterator[OfferedPsk]:
    """The keys that a client offers. Raises ValueError or struct.error for malformed bytes."""
    identities, binders = _split(extension)
    for (identity, age), binder in zip(_identities(identities), _binders(binders), strict=True):
        yield OfferedPsk(identity, age, len(binder))


def _split(extension: bytes) -> tuple[bytes, bytes]:
    (length,) = struct.unpack_from(">H", extension)
    (binders,) = struct.unpack_from(">H", extension, 2 + length)
    if len(extension) != 4 + length + binders:
        raise ValueError("the lengths do not fit")
    return extension[2 : 2 + length], extension[4 + length :]


def _identities(octets: bytes) -> Iterator[tuple[bytes, int]]:
    start = 0
    while start < len(octets):
        (length,) = struct.unpack_from(">H", octets, start)
        (age,) = struct.unpack_from(">I", octets, start + 2 + length)
        yield octets[start + 2 : start + 2 + length], age
        start += 6 + length


def _binders(octets: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(octets):
        length = octets[start]
        yield octets[start + 1 : start + 1 + length]
        start += 1 + length


def _note_unknown(handshake: TlsObject, identity: bytes) -> None:
    handshake.refusal = f"unknown PSK identity {shown_identity(identity)}" if identity else "empty PSK identity"


def _note_failure(error: BaseException) -> None:
    handshake = current()
    if handshake is not None:
        handshake.refusal = f"internal error ({type(error).__name__})"


def _key_of(handshake: TlsObject, identity: bytes) -> bytes | None:
    key = handshake.keys.get(identity)
    if key is None:
        _note_unknown(handshake, identity)
        return None
    handshake.psk_identity = identity
    return key


def _read_client_hello(ssl_pointer: int, alert: Any) -> int:  # noqa: ANN401 -- a pointer of C
    handshake = current()
    if handshake is None:
        return _SUCCESS
    handshake.pointer = ssl_pointer
    handshake.offered = library().offered_ciphers(ssl_pointer)
    extension = library().hello_extension(ssl_pointer, _PRE_SHARED_KEY)
    if extension is None:
        return _SUCCESS
    try:
        offered = list(islice(parse_offered(extension), _MAX_OFFERED + 1))
    except (ValueError, struct.error):
        # OpenSSL refuses it with its own reason.
        return _SUCCESS
    if len(offered) > _MAX_OFFERED:
        handshake.refusal = f"more than {_MAX_OFFERED} pre-shared keys offered at once"
        alert[0] = _ILLEGAL_PARAMETER
        return _FAILURE
    if not _choose_suites(handshake, ssl_pointer, offered):
        alert[0] = _UNKNOWN_PSK_IDENTITY
        return _FAILURE
    return _SUCCESS


def _choose_suites(handshake: TlsObject, ssl_pointer: int, offered: list[OfferedPsk]) -> bool:
    """Whether the handshake may continue."""
    for psk in offered:
        if psk.identity in handshake.keys and psk.binder_bytes in _SUITES:
            handshake.binder_bytes = psk.binder_bytes
            library().SSL_set_ciphersuites(ssl_pointer, _SUITES[psk.binder_bytes][0])
            return True
    # A ticket of another server has an age and is not a pre-shared key: it is ignored, as RFC 8446 requires.
    external = next((psk for psk in offered if psk.ticket_age == 0), None)
    if external is not None:
        _note_unknown(handshake, external.identity)
    return external is None


def _on_client_hello(ssl_pointer: int, alert: Any, _argument: int | None) -> int:  # noqa: ANN401 -- a pointer of C
    try:
        return _read_client_hello(ssl_pointer, alert)
    except BaseException as error:  # noqa: BLE001 -- nothing may be raised through C
        _note_failure(error)
        return _FAILURE


def _on_psk_1_2(ssl_pointer: int, identity: bytes | None, room: int, room_bytes: int) -> int:
    try:
        handshake = current()
        # TLS 1.3 also calls this one, for SHA-256 only; the other callback has answered already.
        if handshake is None or library().SSL_version(ssl_pointer) == TLS_1_3:
            return 0
        key = _key_of(handshake, identity or b"")
        if key is None or len(key) > room_bytes:
            return 0
        ctypes.memmove(room, key, len(key))
        return len(key)
    except BaseException as error:  # noqa: BLE001 -- nothing may be raised through C
        _note_failure(error)
        return 0


def _on_psk_1_3(ssl_pointer: int, start: int, length: int, found: Any) -> int:  # noqa: ANN401 -- a pointer of C
    try:
        found[0] = None
        handshake = current()
        identity = ctypes.string_at(start, length)
        if handshake is None or not handshake.binder_bytes or identity not in handshake.keys:
            # Unknown: the next identity may be known, or the client has a certificate.
            return _SUCCESS
        key = _key_of(handshake, identity)
        session = key and library().new_psk_session(ssl_pointer, key, _SUITES[handshake.binder_bytes][1])
        if not session:
            return _FAILURE
        found[0] = session
        return _SUCCESS
    except BaseException as error:  # noqa: BLE001 -- nothing may be raised through C
        _note_failure(error)
        return _FAILURE


def _standard_callback(identity: str | None) -> bytes:
    handshake = current()
    return b"" if handshake is None else _key_of(handshake, (identity or "").encode()) or b""


# C uses these as long as there is a context.
_ON_CLIENT_HELLO = ClientHelloCallback(_on_client_hello)
_ON_PSK_1_2 = PskServerCallback(_on_psk_1_2)
_ON_PSK_1_3 = FindSessionCallback(_on_psk_1_3)
