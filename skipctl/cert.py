"""``skipctl cert init``: a certificate authority for a laboratory, with certificates for one key provider and clients.

It never overwrites. Only the owner can read private keys, which have no passwords, so that the api starts by itself.
RSA with 3072 bits and P-384, SHA-384. It is for laboratories: nothing is revoked or renewed, and the authority's key is
beside the certificates. With a real authority, use its certificates.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from skipbus.ctl.command import Commands, add_command, add_group
from skipbus.shared.errors import OperatorError

PrivateKey: TypeAlias = "rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey"
_RSA_BITS = 3072
_DEFAULT_DAYS = 365
# Clocks of routers in a laboratory are often wrong.
_BACKDATED = timedelta(days=1)


@dataclass(frozen=True)
class Authority:
    """The key and name that sign certificates."""

    key: rsa.RSAPrivateKey
    name: x509.Name
    days: int


def register(commands: Commands) -> None:
    """Add `cert` and its subcommand."""
    group = add_group(commands, "cert", "make certificates for a laboratory")
    init = add_command(group, "init", "make an authority, and certificates for the api and for clients", _init)
    init.add_argument("folder", type=Path, help="the folder for all files; it is made if it does not exist")
    init.add_argument("--name", default="skipbus lab", help="the authority's common name")
    init.add_argument(
        "--host", action="append", help="a name or address of the api (default localhost, 127.0.0.1, ::1)"
    )
    init.add_argument("--client", action="append", help="a client's common name, which also names its files")
    init.add_argument("--days", type=int, default=_DEFAULT_DAYS, help="how long everything is valid")


def _init(arguments: argparse.Namespace, _environ: Mapping[str, str]) -> int:
    folder: Path = arguments.folder
    hosts = arguments.host or ["localhost", "127.0.0.1", "::1"]
    clients = arguments.client or ["client"]
    if not 1 <= arguments.days <= 36_500:
        raise OperatorError(f"--days is {arguments.days}: give 1 to 36500")
    for client in clients:
        if not client.replace("-", "").replace("_", "").replace(".", "").isalnum() or client in ("ca", "rsa", "ecdsa"):
            raise OperatorError(f"--client {client!r} cannot name a file here; use letters, digits, - and _")
    make_certificates(folder, arguments.name, hosts, clients, arguments.days)
    _tell(folder, clients)
    return 0


def make_certificates(folder: Path, name: str, hosts: list[str], clients: list[str], days: int = _DEFAULT_DAYS) -> None:
    """An authority and its certificates: `rsa` and `ecdsa` for ``hosts``, one for each client. Raises OperatorError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        authority = _make_authority(folder, name, days)
        for kind in ("rsa", "ecdsa"):
            _issue(authority, folder / kind, hosts[0], hosts)
        for client in clients:
            _issue(authority, folder / client, client, [])
    except FileExistsError as error:
        raise OperatorError(f"{error.filename} is there already; nothing is overwritten") from error
    except OSError as error:
        raise OperatorError(f"{folder}: {error.strerror}") from error


def make_broker_certificate(authority_folder: Path, folder: Path, host: str) -> None:
    """An authority for a site's broker, and the broker's certificate, as a server and as a client of other brokers.

    It is not the authority of encryptors, so that an encryptor cannot act as a broker, or a broker as an encryptor. Its
    name is unique, because a broker trusts the authorities of several sites.
    """
    authority_folder.mkdir(mode=0o700, parents=True)
    authority = _make_authority(authority_folder, f"skipbus broker {secrets.token_hex(8)}", _DEFAULT_DAYS)
    both = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
    _issue(authority, folder / "broker", "skipbus broker", [host], both)


def _tell(folder: Path, clients: list[str]) -> None:
    path = folder.absolute()
    print(f"made an authority, server certificates and {len(clients)} client certificates in {path}\n")
    print(f"SKIP_TLS_CERT_FILE={path}/rsa.pem,{path}/ecdsa.pem")
    print(f"SKIP_TLS_KEY_FILE={path}/rsa.key,{path}/ecdsa.key")
    print(f"SKIP_TLS_CLIENT_CA_FILE={path}/ca.pem")


def _make_authority(folder: Path, common_name: str, days: int) -> Authority:
    key = rsa.generate_private_key(65537, _RSA_BITS)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    _write_private(folder / "ca.key", key)
    usage = _key_usage(key_cert_sign=True, crl_sign=True)
    builder = _builder(name, name, key, days).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = builder.add_extension(usage, critical=True).add_extension(identifier, critical=False)
    _write_new(folder / "ca.pem", certificate.sign(key, hashes.SHA384()).public_bytes(_PEM), 0o644)
    return Authority(key, name, days)


def _issue(
    authority: Authority, path: Path, common_name: str, hosts: list[str], purposes: Sequence[x509.ObjectIdentifier] = ()
) -> None:
    """A certificate for a server at ``hosts`` or, without any, for a client; or for these purposes."""
    key: PrivateKey
    key = rsa.generate_private_key(65537, _RSA_BITS) if path.name == "rsa" else ec.generate_private_key(ec.SECP384R1())
    _write_private(path.with_name(path.name + ".key"), key)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    purposes = purposes or [ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = _builder(subject, authority.name, key, authority.days)
    # The draft's TLS_RSA_WITH_AES_256_CBC_SHA256 has the client encrypt to the RSA key.
    usage = _key_usage(digital_signature=True, key_encipherment=isinstance(key, rsa.RSAPrivateKey))
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    names: list[x509.GeneralName] = [_general_name(host) for host in hosts or [common_name]]
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority.key, hashes.SHA384())
    )
    _write_new(path.with_name(path.name + ".pem"), certificate.public_bytes(_PEM), 0o644)


def _builder(subject: x509.Name, issuer: x509.Name, key: PrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise OperatorError(f"{host!r} is neither an address nor a name of a host") from error


def _key_usage(**wanted: bool) -> x509.KeyUsage:
    every = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign"
        " encipher_only decipher_only"
    )
    return x509.KeyUsage(**dict.fromkeys(every.split(), False) | wanted)


def _write_private(path: Path, key: PrivateKey) -> None:
    octets = key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write_new(path, octets, 0o600)


def _write_new(path: Path, octets: bytes, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
        file.write(octets)


_PEM = serialization.Encoding.PEM
