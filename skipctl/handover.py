"""The hand-over file by which two sites are joined: a site's identity, its broker's address, and an account there.

Owns the file's format: TOML, and secret, because it holds the password of the account for the other site. It is read
as if an attacker had written it: its values go into files that a broker and the services trust, so each value is
checked, and nothing is copied unchecked.
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from skipbus.shared.broker.names import encode_id
from skipbus.shared.crypto.identity import fingerprint
from skipbus.shared.errors import OperatorError
from skipbus.shared.protocol.system_ids import validate_system_id
from skipbus.shared.settings.peers import identity_line, parse_identity_line
from skipbus.shared.settings.values import read_regular_file

FORM = 1
DEFAULT_BROKER_PORT = 5671
_FIELDS = {"form", "from", "for", "identity", "broker", "account", "password", "authority"}
# A host name, because the certificate is checked against it; without characters that are special in a URI or in .env.
_BROKER = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?)(?::([0-9]{1,5}))?")
_PASSWORD = re.compile(r"[A-Za-z0-9]{32,128}")


@dataclass(frozen=True)
class Handover:
    """From the site of ``sender`` for the site of ``receiver``. ``authority`` signs the sender's broker."""

    sender: str
    receiver: str
    identity: bytes = field(repr=False)
    broker: tuple[str, int]
    account: str
    password: str = field(repr=False)
    authority: str = field(repr=False)

    @property
    def file_name(self) -> str:
        """`KP_Paris-to-KP_Oslo.toml`"""
        return f"{encode_id(self.sender)}-to-{encode_id(self.receiver)}.toml"

    def text(self) -> str:
        """The file."""
        values: dict[str, object] = {
            "form": FORM,
            "from": self.sender,
            "for": self.receiver,
            "identity": identity_line(self.identity),
            "broker": f"{self.broker[0]}:{self.broker[1]}",
            "account": self.account,
            "password": self.password,
            "authority": self.authority,
        }
        head = (
            f"# SECRET. From {self.sender}, for {self.receiver} alone, who does\n"
            "# skipctl site join FOLDER THIS_FILE and deletes it.\n"
            f"# Identity {fingerprint(self.identity)}\n"
        )
        # A JSON string is also a TOML string.
        return head + "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def account_for(peer_id: str) -> str:
    """The name of the account with which the broker of ``peer_id`` fetches."""
    return f"federation.{encode_id(peer_id)}"


def parse_broker(text: str) -> tuple[str, int]:
    """``HOST[:PORT]``. Raises OperatorError."""
    found = _BROKER.fullmatch(text)
    port = int(found[2] or DEFAULT_BROKER_PORT) if found else 0
    if found is None or not 0 < port < 65536 or not re.search("[A-Za-z]", found[1]):
        raise OperatorError(
            f"{text!r} is not the HOST or HOST:PORT at which other sites reach a broker; HOST is a name"
        )
    return found[1], port


def read_handover(path: Path) -> Handover:
    """The hand-over in the file. Raises OperatorError with what is wrong."""
    try:
        values = tomllib.loads(read_regular_file(str(path))[0].decode())
        return _handover(values)
    except OSError as error:
        raise OperatorError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise OperatorError(f"{path} is not a whole hand-over of this release: {error}") from error


def _handover(values: dict[str, object]) -> Handover:
    if values.keys() != _FIELDS:
        raise ValueError(f"it has not the fields {', '.join(sorted(_FIELDS))} and no others")
    if values.pop("form") != FORM:
        raise ValueError(f"its form is not {FORM}")
    texts = {name: value for name, value in values.items() if isinstance(value, str)}
    if texts.keys() != values.keys():
        raise ValueError("a value is not a text")
    receiver = validate_system_id(texts["for"])
    if texts["account"] != account_for(receiver) or not _PASSWORD.fullmatch(texts["password"]):
        raise ValueError("the account or its password is not of the form that skipctl gives")
    return Handover(
        sender=validate_system_id(texts["from"]),
        receiver=receiver,
        identity=parse_identity_line(texts["identity"]),
        broker=parse_broker(texts["broker"]),
        account=texts["account"],
        password=texts["password"],
        authority=_authorities(texts["authority"]),
    )


def _authorities(pem: str) -> str:
    """Only the certificates, without other text."""
    certificates = x509.load_pem_x509_certificates(pem.encode())
    for certificate in certificates:
        try:
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        except x509.ExtensionNotFound as error:
            raise ValueError("the authority is no authority") from error
        if not constraints.ca:
            raise ValueError("the authority is no authority")
    return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in certificates)
