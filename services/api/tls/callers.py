"""The caller of a connection: its PSK identity or certificate names, and which remote systems it may ask for.

Rules: the caller is determined once for each connection, never for a request. Without a table of identities in the
TOML file every caller that finished the handshake may ask for every configured remoteSystemID. With a table, a caller
may ask for what all patterns that match one of its names allow together, and for nothing if no pattern matches.
A certificate's names are its subject (RFC 4514), its common names and its subject alternative names.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509.oid import NameOID

from skipbus.shared.protocol.system_ids import RemoteSystemIds

_MAX_SHOWN = 256
# What cryptography raises for certificates that OpenSSL accepts; only some of these are ValueErrors.
_UNREADABLE = (
    ValueError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True, slots=True)
class Caller:
    """The other end of a TLS connection. ``allowed`` is None if nothing is limited.

    Patterns of identities are compared with ``names``, which is empty for a caller that proved no name.
    """

    shown: str
    proof: str
    allowed: RemoteSystemIds | None = field(repr=False)
    names: tuple[str, ...] = field(default=(), repr=False)

    def may_ask_for(self, remote_system_id: str) -> bool:
        """Whether the caller may have keys shared with that key provider."""
        return self.allowed is None or remote_system_id in self.allowed


class CallerBook:
    """The table of identities: patterns (``* ? [list]``) to remote system ids or globs of them."""

    def __init__(self, table: Mapping[str, Iterable[str]], local_system_id: str) -> None:
        self._local_system_id = local_system_id
        self._rules = [(re.compile(fnmatch.translate(pattern)), tuple(ids)) for pattern, ids in table.items()]
        self._of_psk = lru_cache(maxsize=4096)(self._psk_caller)

    def identify(self, psk_identity: bytes | None, certificate: bytes | None) -> Caller:
        """The caller of a connection, by its proven PSK identity or else its certificate in DER."""
        if psk_identity is not None:
            return self._of_psk(psk_identity)
        if certificate is not None:
            return self._certificate_caller(certificate)
        return Caller("-", "none", self._allowed(()))

    def _psk_caller(self, identity: bytes) -> Caller:
        name = identity.decode(errors="backslashreplace")
        return Caller(_printable(name), "psk", self._allowed((name,)), (name,))

    def _certificate_caller(self, der: bytes) -> Caller:
        try:
            subject, names = certificate_names(x509.load_der_x509_certificate(der))
        except _UNREADABLE:
            # OpenSSL accepted what cryptography cannot read: the caller has proved a certificate, but has no name.
            return Caller("unreadable certificate", "certificate", self._allowed(()))
        shown = "; ".join([subject, *(f"{kind}:{name}" for kind, name in names if kind != "CN")])
        all_names = (subject, *(name for _, name in names))
        return Caller(_printable(shown), "certificate", self._allowed(all_names), all_names)

    def _allowed(self, names: Iterable[str]) -> RemoteSystemIds | None:
        if not self._rules:
            return None
        ids = [i for pattern, ids in self._rules if any(pattern.match(name) for name in names) for i in ids]
        return RemoteSystemIds(ids, self._local_system_id)


def certificate_names(certificate: x509.Certificate) -> tuple[str, list[tuple[str, str]]]:
    """The subject (RFC 4514), and common names and alternative names with their kinds. Raises ValueError."""
    subject = certificate.subject
    names = [("CN", str(part.value)) for part in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return subject.rfc4514_string(), names + list(_alternative_names(certificate))


def _alternative_names(certificate: x509.Certificate) -> Iterator[tuple[str, str]]:
    try:
        entries = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return
    for entry in entries:
        if isinstance(entry, x509.DNSName):
            yield "DNS", entry.value
        elif isinstance(entry, x509.IPAddress):
            yield "IP", str(entry.value)
        elif isinstance(entry, x509.RFC822Name):
            yield "email", entry.value
        elif isinstance(entry, x509.UniformResourceIdentifier):
            yield "URI", entry.value


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:_MAX_SHOWN])
