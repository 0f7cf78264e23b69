"""What the syncer's tests share: KPs that consist of a syncer process only, and a hand on the store and the bus.

The part of api and janitor is played here: announcements and outbox rows are written as those write them. The
identities are in the test's hands, so it can sign what a peer would sign, and what a thief would.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Engine, func, select

from sandbox.key_provider import KeyProvider
from sandbox.mariadb import Database
from sandbox.simulated_peer import SimulatedPeer
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.liveness import peer_status
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.announcements import Announcement, sign_announcement
from skipbus.shared.protocol.envelopes import EnvelopeType
from skipbus.shared.store.announcements import fetch_announcement, upsert_announcement
from skipbus.shared.store.engine import make_engine
from skipbus.shared.store.migrate import bring_up_to_date
from skipbus.shared.store.outbox import OutboxRow, insert_outbox_rows
from skipbus.shared.store.peers import PeerRow, fetch_peer_rows
from skipbus.shared.store.schema import INBOX, OUTBOX, PROCESSES
from tests.waiting import wait_for

HEARTBEAT_SECONDS = 0.5
TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class Kp:
    """One key provider; ``provider`` runs its syncer, or is None for one that only the test speaks for."""

    id: str
    identity: Identity
    provider: KeyProvider | None = None

    @property
    def process(self) -> KeyProvider:
        assert self.provider is not None
        return self.provider

    @property
    def log(self) -> str:
        log = self.process.log_of("syncer")
        return log.read_text() if log.exists() else ""


class Rig:
    """A store, a broker, and KPs whose names are this rig's own, so that tests can share the broker."""

    def __init__(self, root: Path, database: Database, rabbitmq_url: str) -> None:
        self.root = root
        self.database = database
        self.rabbitmq_url = rabbitmq_url
        self.suffix = secrets.token_hex(3)
        self.kps: list[Kp] = []
        bring_up_to_date(database.settings)
        self.engine: Engine = make_engine(database.settings)

    def name(self, name: str) -> str:
        return f"{name}.{self.suffix}"

    def add(self, name: str, *remotes: str, **env: str) -> Kp:
        """A KP with a syncer that is not started yet, announced."""
        root = self.root / name
        root.mkdir()
        identity = Keyring.create(root / "keyring", self.name(name)).identity
        env = {"SKIP_HEARTBEAT_SECONDS": str(HEARTBEAT_SECONDS), "SKIP_LOG_LEVEL": "debug"} | env
        names = [self.name(remote) for remote in remotes]
        provider = KeyProvider(self.name(name), names, self.database, self.rabbitmq_url, root=root, env_overrides=env)
        kp = Kp(self.name(name), identity, provider)
        self.kps.append(kp)
        self.announce(kp.id, kp.identity)
        return kp

    def add_twin(self, kp: Kp) -> KeyProvider:
        """Another host of the same KP, with a copy of its keyring."""
        twin = KeyProvider(kp.id, [], self.database, self.rabbitmq_url, root=self.root / f"twin-{kp.id}")
        twin.environ = kp.process.environ | {"SKIP_PORT": str(twin.port)}
        self.kps.append(Kp(kp.id, kp.identity, twin))
        return twin

    def add_simulated_peer(self, name: str) -> Kp:
        """A KP that only the test speaks for, announced."""
        kp = Kp(self.name(name), Identity.generate())
        self.announce(kp.id, kp.identity)
        return kp

    def close(self) -> None:
        for kp in self.kps:
            kp.process.stop_all()
        self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the store

    def announce(self, system_id: str, identity: Identity) -> bytes:
        """What the janitor does; the announcement's bytes."""
        announcement = Announcement(system_id, identity.public_key, now_ms(), "test", ())
        body = sign_announcement(announcement, identity)
        with self.engine.begin() as connection:
            upsert_announcement(connection, announcement, body)
        return body

    def announcement(self, system_id: str) -> bytes | None:
        with self.engine.connect() as connection:
            return fetch_announcement(connection, system_id)

    def tell(self, local: Kp, peer: Kp, kind: EnvelopeType, count: int = 1) -> None:
        """What api and janitor do: one outbox row."""
        with self.engine.begin() as connection:
            row = OutboxRow(local.id, peer.id, kind.value, events(kind, count), count, now_ms())
            insert_outbox_rows(connection, [row])

    def peer(self, local: Kp, peer: Kp) -> PeerRow | None:
        with self.engine.connect() as connection:
            rows = fetch_peer_rows(connection, local.id)
        return next((row for row in rows if row.peer_id == peer.id), None)

    def count(self, local: Kp, peer: Kp, counter: str) -> int:
        row = self.peer(local, peer)
        return int(getattr(row, counter)) if row else 0

    def online(self, local: Kp, peer: Kp) -> bool:
        row = self.peer(local, peer)
        return row is not None and peer_status(row.last_heartbeat_ms, row.heartbeat_interval_ms, now_ms()) == "online"

    def outbox(self, local: Kp) -> list[Any]:
        with self.engine.connect() as connection:
            return list(connection.execute(select(OUTBOX).where(OUTBOX.c.local_id == local.id)))

    def inbox_size(self, local: Kp) -> int:
        with self.engine.connect() as connection:
            statement = select(func.count()).select_from(INBOX).where(INBOX.c.local_id == local.id)
            return int(connection.execute(statement).scalar_one())

    def sign_of_life(self, kp: Kp) -> str | None:
        with self.engine.connect() as connection:
            statement = select(PROCESSES.c.detail).where(PROCESSES.c.local_id == kp.id)
            return connection.execute(statement).scalars().first()

    # --- waiting

    def wait_online(self, *kps: Kp) -> None:
        """Until each has heard every other."""
        for local in kps:
            for peer in kps:
                if local is not peer:
                    wait_for(lambda here=local, there=peer: self.online(here, there), timeout_seconds=TIMEOUT_SECONDS)  # type: ignore[misc]

    def wait_count(self, local: Kp, peer: Kp, counter: str, count: int) -> None:
        wait_for(lambda: self.count(local, peer, counter) >= count, timeout_seconds=TIMEOUT_SECONDS)
        assert self.count(local, peer, counter) == count

    def wait_outbox_empty(self, local: Kp) -> None:
        wait_for(lambda: not self.outbox(local), timeout_seconds=TIMEOUT_SECONDS)


def events(kind: EnvelopeType, count: int) -> bytes:
    """The payload of an outbox row with that many events."""
    middle = [256, now_ms()] if kind is EnvelopeType.KEY_ISSUED else [now_ms()]
    return encoding.pack([[secrets.token_bytes(16), *middle, f"c-{number}"] for number in range(count)])


def signed(
    sender: Kp,
    target: Kp,
    kind: EnvelopeType,
    payload: bytes,
    *,
    identity: Identity | None = None,
    number: int | None = None,
    age_ms: int = 0,
) -> bytes:
    """An envelope as ``sender`` would sign it, or as whoever has ``identity`` would."""
    peer = SimulatedPeer(sender.id, sender.identity)
    return peer.sign(target.id, kind, payload, signer=identity, number=number, age_ms=age_ms)
