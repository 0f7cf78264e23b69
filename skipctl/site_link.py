"""Joins a site's folder to other sites: their accounts at its broker, and the content of their hand-over files.

Owns the broker's files (`rabbitmq/broker`), `handover` and the ``[[peers]]`` tables of `config/skipbus.toml`. For a
known site everything is renewed except its identity: only the operator replaces that, by hand.
"""

from __future__ import annotations

import secrets
import tomllib
from pathlib import Path

from skipbus.ctl.broker_definitions import BROKER_FILES, SiteDefinitions, upstream_uri
from skipbus.ctl.handover import Handover, account_for, parse_broker
from skipbus.ctl.site_folder import read_environment, replace
from skipbus.shared.broker.names import encode_id
from skipbus.shared.errors import OperatorError
from skipbus.shared.settings.peers import parse_identity_line, peer_block, read_peers


class SiteFolder:
    """The folder of a site that `skipctl site init` made with ``--peer``. Raises OperatorError."""

    def __init__(self, folder: Path) -> None:
        environment = read_environment(folder)
        if not environment.keys() >= {"SYSTEM_ID", "BROKER_HOST", "BROKER_PORT"}:
            raise OperatorError(f"{folder} is not the folder of a site of its own (`skipctl site init` with --peer)")
        self.system_id = environment["SYSTEM_ID"]
        self._reached_at = parse_broker(f"{environment['BROKER_HOST']}:{environment['BROKER_PORT']}")
        self._folder = folder
        self._broker = folder / "rabbitmq" / "broker"

    def invite(self, peer_id: str) -> Path:
        """Makes the account of a peer's broker, with a new password, and the hand-over file for the peer."""
        self._check_other(peer_id)
        password = secrets.token_hex(24)
        made = Handover(
            sender=self.system_id,
            receiver=peer_id,
            identity=self._own_identity(),
            broker=self._reached_at,
            account=account_for(peer_id),
            password=password,
            authority=self._own_authority(),
        )
        admitted = self._definitions()
        admitted.admit(peer_id, made.account, password)
        replace(self._broker / "definitions.json", admitted.text(), 0o444)
        path = self._folder / "handover" / made.file_name
        replace(path, made.text())
        return path

    def join(self, handover: Handover) -> None:
        """Applies a hand-over file that a peer made for this site. Raises OperatorError."""
        if handover.receiver != self.system_id:
            raise OperatorError(f"the hand-over is for {handover.receiver}, not for {self.system_id}")
        self._check_other(handover.sender)
        # First what may be refused.
        self._add_peer(handover.sender, handover.identity)
        name = f"authorities/{encode_id(handover.sender)}.pem"
        replace(self._broker / name, handover.authority, 0o444)
        self._bundle_authorities()
        fetching = self._definitions()
        host, port = handover.broker
        uri = upstream_uri(handover.account, handover.password, host, port, f"{BROKER_FILES}/{name}")
        fetching.fetch_from(handover.sender, uri)
        replace(self._broker / "definitions.json", fetching.text(), 0o444)

    def _check_other(self, peer_id: str) -> None:
        if peer_id == self.system_id:
            raise OperatorError(f"{peer_id} is this site itself")

    def _add_peer(self, peer_id: str, identity: bytes) -> None:
        file = self._folder / "config" / "skipbus.toml"
        text = file.read_text()
        try:
            tables = tomllib.loads(text).get("peers", [])
        except ValueError as error:
            raise OperatorError(f"{file} is not TOML: {error}") from error
        known, problems = read_peers(tables, str(file), self.system_id)
        if problems:
            raise OperatorError("; ".join(problems))
        if peer_id not in known:
            replace(file, f"{text.rstrip()}\n\n{peer_block(peer_id, identity)}", 0o444)
        elif known[peer_id].identity != identity:
            raise OperatorError(
                f"the hand-over has another identity of {peer_id} than {file}: if its operator confirms the new one, "
                f"take the [[peers]] table of {peer_id} out of that file first"
            )

    def _bundle_authorities(self) -> None:
        """The authorities that brokers which fetch here may have: the other sites', and the own one."""
        files = sorted((self._broker / "authorities").glob("*.pem"))
        texts = [self._own_authority(), *(file.read_text() for file in files)]
        replace(self._broker / "authorities.pem", "".join(texts), 0o444)

    def _definitions(self) -> SiteDefinitions:
        return SiteDefinitions((self._broker / "definitions.json").read_text())

    def _own_identity(self) -> bytes:
        return parse_identity_line((self._folder / "identity").read_text().splitlines()[-1])

    def _own_authority(self) -> str:
        return (self._folder / "authorities" / "broker" / "ca.pem").read_text()
