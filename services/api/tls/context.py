"""The server's TLS context: protocols, suites, groups and certificates.

The suites are those of the draft's Table 1, those that routers offer in addition, and modern ones for other clients,
strongest and forward secret first. Not supported: anything below 128 bits, SHA-1 except the draft's own
``DHE-PSK-AES256-CBC-SHA``, renegotiation, compression, resumption. OpenSSL's security level stays 2, because level 3
refuses the suites without forward secrecy that routers use.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from skipbus.services.api.tls import openssl, psk
from skipbus.services.api.tls.callers import CallerBook
from skipbus.services.api.tls.handshake import TlsContext
from skipbus.services.api.tls.self_check import PskModes
from skipbus.shared.errors import OperatorError
from skipbus.shared.protocol.psk_file import PskKeys
from skipbus.shared.settings import TlsSettings

CERTIFICATE_SUITES = (
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-CHACHA20-POLY1305",
    # The draft's suite, for clients that have nothing better.
    "AES256-SHA256",
)
PSK_SUITES = (
    "ECDHE-PSK-CHACHA20-POLY1305",
    "DHE-PSK-AES256-GCM-SHA384",
    "ECDHE-PSK-AES256-CBC-SHA384",
    "DHE-PSK-AES256-CBC-SHA384",
    "PSK-AES256-GCM-SHA384",
    "PSK-AES256-CBC-SHA384",
    # The draft's only suite with SHA-1.
    "DHE-PSK-AES256-CBC-SHA",
)
_TLS_1_3_SUITES = b"TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256"
# The hybrid group first, if OpenSSL has it (3.5): a quantum computer cannot decrypt recorded traffic later. The slash
# asks a client that supports it, but began with another group, to begin again. Older releases support neither.
_GROUPS = ("X25519MLKEM768/X25519:secp384r1:secp256r1:ffdhe3072", "X25519:secp384r1:secp256r1:ffdhe3072")
_SIGNATURES = (
    "ecdsa_secp384r1_sha384:ecdsa_secp521r1_sha512:ecdsa_secp256r1_sha256:ed25519:ed448:"
    "rsa_pss_rsae_sha384:rsa_pss_rsae_sha512:rsa_pss_rsae_sha256:rsa_pss_pss_sha384:rsa_pss_pss_sha512:rsa_pss_pss_sha256:"
    "rsa_pkcs1_sha384:rsa_pkcs1_sha512:rsa_pkcs1_sha256"
)
# Neither SHA-1 nor SHA-224. ML-DSA if OpenSSL has it (3.5): the question mark skips an unknown algorithm.
_SIGNATURE_LISTS = (f"?mldsa87:?mldsa65:?mldsa44:{_SIGNATURES}", _SIGNATURES)
# RFC 7919's group of 3072 bits, 128 bits of security, for the DHE suites of TLS 1.2.
_DH_GROUP = Path(__file__).with_name("ffdhe3072.pem")
_OPTIONS = (
    ssl.OP_NO_COMPRESSION
    | ssl.OP_NO_RENEGOTIATION
    | ssl.OP_NO_TICKET
    | ssl.OP_CIPHER_SERVER_PREFERENCE
    | ssl.OP_SINGLE_DH_USE
    | ssl.OP_SINGLE_ECDH_USE
)


@dataclass(frozen=True)
class Recipe:
    """What a context needs in addition to the files."""

    settings: TlsSettings
    callers: CallerBook
    modes: PskModes


def make_context(recipe: Recipe, keys: PskKeys) -> TlsContext:
    """A context with the current files. Raises OperatorError with the file that is wrong."""
    settings, modes = recipe.settings, recipe.modes
    context = TlsContext(ssl.PROTOCOL_TLS_SERVER)
    context.keys, context.callers = keys, recipe.callers
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= _OPTIONS
    context.num_tickets = 0
    # Only clients with a pre-shared key offer these suites, and they may have no certificate: these come first.
    context.set_ciphers(":".join([*_psk_suites(settings, modes), *_certificate_suites(settings)]))
    context.load_dh_params(str(_DH_GROUP))
    _load_certificates(context, settings)
    if modes.native:
        _go_beyond_ssl(context)
    if settings.psk_files:
        _serve_psk(context, settings, modes)
    return context


def _certificate_suites(settings: TlsSettings) -> Sequence[str]:
    return CERTIFICATE_SUITES if settings.cert_files else ()


def _psk_suites(settings: TlsSettings, modes: PskModes) -> Sequence[str]:
    return PSK_SUITES if settings.psk_files and modes.any else ()


def _load_certificates(context: TlsContext, settings: TlsSettings) -> None:
    for chain, key in zip(settings.cert_files, settings.key_files, strict=True):
        try:
            # Without a password callback, OpenSSL would ask at the terminal and wait.
            context.load_cert_chain(chain, key, password=_no_password)
        except (OSError, ValueError) as error:
            raise OperatorError(
                f"{chain} with {key}: {_words(error)} (SKIP_TLS_CERT_FILE, SKIP_TLS_KEY_FILE)"
            ) from error
    for authorities in settings.client_ca_files:
        try:
            context.load_verify_locations(authorities)
        except (OSError, ValueError) as error:
            raise OperatorError(f"{authorities}: {_words(error)} (SKIP_TLS_CLIENT_CA_FILE)") from error
        # A client with a pre-shared key is not asked for a certificate: OpenSSL never asks with those suites.
        context.verify_mode = ssl.CERT_REQUIRED


def _no_password() -> str:
    raise ValueError("the private key is encrypted; give one without a password, readable by this user only")


def _words(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).lower().replace("_", " ")
    return getattr(error, "strerror", None) or str(error)


def _go_beyond_ssl(context: TlsContext) -> None:
    library = openssl.library()
    library.forget_sessions(context)
    library.SSL_CTX_set_ciphersuites(openssl.context_pointer(context), _TLS_1_3_SUITES)
    # The first list that this OpenSSL supports; if it supports none, its own list, which security level 2 bounds.
    any(library.set_groups(context, groups) for groups in _GROUPS)
    any(library.set_signature_algorithms(context, names) for names in _SIGNATURE_LISTS)


def _serve_psk(context: TlsContext, settings: TlsSettings, modes: PskModes) -> None:
    if modes.native:
        psk.install(context)
    elif modes.standard:
        psk.install_standard(context)
        if not settings.cert_files:
            # A client that offers both versions must get the version that works.
            context.maximum_version = ssl.TLSVersion.TLSv1_2
    elif not settings.cert_files:
        raise OperatorError(f"{modes.fault}, and no certificate is configured to serve TLS with")
