"""The reason of a refused handshake, in one log line that an operator can act on.

Owns the sentences for OpenSSL's errors. If no suite fits, the line lists what the client offered. The client gets only
the alert that OpenSSL chose. No key is available here.
"""

from __future__ import annotations

import ssl

from skipbus.services.api.tls import openssl
from skipbus.services.api.tls.handshake import TlsObject
from skipbus.shared.logging import get_logger
from skipbus.shared.protocol.psk_file import shown_identity

_log = get_logger("tls")
_MAX_OFFERED = 32
_WRONG_KEY = frozenset(
    {
        "BINDER_DOES_NOT_VERIFY",
        "DECRYPTION_FAILED_OR_BAD_RECORD_MAC",
        "BAD_RECORD_MAC",
        "DIGEST_CHECK_FAILED",
        "BLOCK_CIPHER_PAD_IS_WRONG",
        "TLSV1_ALERT_DECRYPT_ERROR",
        "SSLV3_ALERT_BAD_RECORD_MAC",
        # OpenSSL 3.2 and later put this above the record's own reason, and Python shows only the topmost.
        "RECORD_LAYER_FAILURE",
    }
)
_NO_CIPHER = frozenset({"NO_SHARED_CIPHER", "NO_SUITABLE_SIGNATURE_ALGORITHM", "NO_CIPHERS_SPECIFIED"})
_SENTENCES = {
    "HTTP_REQUEST": "plain HTTP on the TLS port",
    "UNSUPPORTED_PROTOCOL": "no shared version: only TLS 1.2 and 1.3 are spoken here",
    "VERSION_TOO_LOW": "no shared version: only TLS 1.2 and 1.3 are spoken here",
    "WRONG_VERSION_NUMBER": "this is not TLS",
    "WRONG_SSL_VERSION": "this is not TLS",
    "RECORD_LAYER_FAILURE": "a record is damaged or too long",
    "PACKET_LENGTH_TOO_LONG": "a record is damaged or too long",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no client certificate, and no pre-shared key",
    "NO_SUITABLE_KEY_SHARE": "no shared key exchange group",
    "NO_SHARED_GROUP": "no shared key exchange group",
    "NO_SHARED_SIGNATURE_ALGORITHMS": "no shared signature algorithm",
}
TIMEOUT = "timeout: the handshake did not end within {seconds:g} s"
GONE = "the client ended the connection during the handshake"
TOO_MANY = "too many connections from this address"
CROWDED_OUT = "crowded out: SKIP_MAX_CONNECTIONS is reached, and this handshake was the oldest that had not ended"


def log_failure(handshake: TlsObject, error: ssl.SSLError) -> None:
    """Logs a handshake that OpenSSL has ended. Only inside the handshake."""
    reason = explain(handshake, error)
    fields: dict[str, object] = {}
    if handshake.psk_identity is not None:
        fields["identity"] = shown_identity(handshake.psk_identity).strip("'")
    if error.reason in _NO_CIPHER and not handshake.refusal:
        fields["offered"] = offered_names(handshake)
    log_refusal(handshake.accepted.address if handshake.accepted else "-", reason, **fields)


def log_refusal(address: str, reason: str, **fields: object) -> None:
    """Logs one refused handshake."""
    _log.warning("handshake refused", client=address, reason=reason, **fields)


def explain(handshake: TlsObject, error: ssl.SSLError) -> str:
    """The reason in a sentence."""
    if handshake.refusal is not None:
        return handshake.refusal
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"bad client certificate: {error.verify_message}"
    reason = error.reason or ""
    if reason in _WRONG_KEY and handshake.psk_identity is not None:
        return f"wrong key for the PSK identity {shown_identity(handshake.psk_identity)}"
    if reason in _NO_CIPHER:
        return "no shared cipher suite"
    return _SENTENCES.get(reason) or _alert(reason) or _words(reason) or str(error)


def offered_names(handshake: TlsObject) -> list[str]:
    """The suites in the ClientHello, without signalling values."""
    offered = handshake.offered
    ids = [offered[i : i + 2] for i in range(0, len(offered) - 1, 2)]
    # Without GREASE (RFC 8701) and the two values for renegotiation and fallback.
    real = [i for i in ids if i not in (b"\x00\xff", b"\x56\x00") and not (i[0] == i[1] and i[0] & 0x0F == 0x0A)]
    if not handshake.pointer:
        return [f"0x{i.hex().upper()}" for i in real[:_MAX_OFFERED]]
    return [openssl.library().cipher_name(handshake.pointer, i) for i in real[:_MAX_OFFERED]]


def _alert(reason: str) -> str | None:
    """The client's alert, if the client ended the handshake."""
    _, marker, alert = reason.partition("_ALERT_")
    return f"the client refused, with the alert {_words(alert)}" if marker else None


def _words(reason: str) -> str:
    return reason.lower().replace("_", " ")
