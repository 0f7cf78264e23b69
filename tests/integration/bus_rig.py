"""Two sites for the syncer's tests of bus links: a store each, one broker, and the test in the place of the two apis.

What an api writes for a bus link is written here as it writes it: sealed keys in ``key.placed`` and ``key.stocked``
rows, the wrapping keys beside them, own copies in ``stock``.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from sqlalchemy import func, select

from sandbox.key_provider import BusPeer
from sandbox.mariadb import Database
from sandbox.simulated_peer import SealedKeys, record_fields, wrapping_key_fields
from skipbus.services.syncer.outbox import SEALED_TYPES
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import EpochSpan, PublicEpoch, new_epoch_id
from skipbus.shared.crypto.hpke import HybridPrivateKey
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.crypto.sealing import KeyRecord, SealedWrappingKey, make_wrapping_key, open_wrapping_key
from skipbus.shared.protocol import encoding
from skipbus.shared.protocol.announcements import Announcement, sign_announcement
from skipbus.shared.settings.peers import identity_line
from skipbus.shared.store.announcements import upsert_announcement
from skipbus.shared.store.outbox import KEY_PLACED, KEY_STOCKED, OutboxRow, insert_outbox_rows
from skipbus.shared.store.schema import BUS_ANNOUNCEMENTS, KEY_RECORDS, STOCK, STOCK_HELD, WITHDRAWN_KEYS
from skipbus.shared.store.wrapping_keys import fetch_sealed_wrapping_keys, insert_wrapping_keys
from tests.integration.syncer_rig import TIMEOUT_SECONDS, Kp, Rig
from tests.waiting import wait_for

KEY_TTL_MS = 3_600_000


@dataclass
class Site:
    """One KP with a store of its own. A simulated peer has a store too, which no process reads."""

    rig: Rig
    kp: Kp
    epoch_id: bytes = field(default_factory=new_epoch_id)
    epoch_key: HybridPrivateKey = field(default_factory=HybridPrivateKey.generate)

    @property
    def epoch(self) -> PublicEpoch:
        span = EpochSpan(now_ms() - 60_000, now_ms() + KEY_TTL_MS, self._destroy_ms)
        return PublicEpoch(self.epoch_id, span, self.epoch_key.public_bytes())

    def __post_init__(self) -> None:
        self._destroy_ms = now_ms() + 3 * KEY_TTL_MS
        self.announce()

    def announce(self) -> bytes:
        """What the janitor does."""
        said = Announcement(self.kp.id, self.kp.identity.public_key, now_ms() + 1, "test", (self.epoch,))
        body = sign_announcement(said, self.kp.identity)
        with self.rig.engine.begin() as connection:
            upsert_announcement(connection, said, body)
        return body

    def knows(self, other: Site) -> bool:
        """Whether the other's announcement has come over the bus."""
        with self.rig.engine.connect() as connection:
            statement = select(func.count()).where(
                BUS_ANNOUNCEMENTS.c.local_id == self.kp.id, BUS_ANNOUNCEMENTS.c.system_id == other.kp.id
            )
            return bool(connection.execute(statement).scalar_one())

    # --- in the place of the source's api

    def place(self, target: Site, count: int = 1, kind: str = KEY_PLACED, ttl_ms: int = KEY_TTL_MS) -> Placed:
        """Commits sealed keys for the target, and for stock the own copies."""
        placed = seal(self.kp, target, count, ttl_ms)
        self.commit(placed, kind)
        return placed

    def commit(self, placed: Placed, kind: str) -> None:
        assert kind in SEALED_TYPES
        row = OutboxRow(
            self.kp.id, placed.target, kind, encoding.pack(placed.rows), len(placed.rows), now_ms(), placed.token
        )
        with self.rig.engine.begin() as connection:
            insert_wrapping_keys(connection, [placed.wrapping_key])
            insert_outbox_rows(connection, [row])
            if kind == KEY_STOCKED:
                connection.execute(STOCK.insert(), [self._copy(placed, record) for record in placed.records])

    def _copy(self, placed: Placed, record: KeyRecord) -> dict[str, Any]:
        return {
            "local_id": self.kp.id,
            "peer_id": placed.target,
            "expires_ms": record.expires_ms,
            "key_id": record.key_id,
            "size_bits": record.size_bits,
            "wrapping_key_id": record.wrapping_key_id,
            "nonce": record.nonce,
            "sealed": record.sealed,
            "token": placed.token,
        }

    def tell(self, target: Site, kind: str, events: Sequence[Sequence[object]]) -> None:
        """A row of events."""
        payload = encoding.pack([list(event) for event in events])
        with self.rig.engine.begin() as connection:
            row = OutboxRow(self.kp.id, target.kp.id, kind, payload, len(events), now_ms())
            insert_outbox_rows(connection, [row])

    def withdraw(self, target: Site, placed: Placed) -> None:
        self.tell(target, "key.withdrawn", [[r.key_id, r.expires_ms, r.correlation_id] for r in placed.records])

    def stock(self, target: Site) -> list[Any]:
        with self.rig.engine.connect() as connection:
            statement = select(STOCK).where(STOCK.c.local_id == self.kp.id, STOCK.c.peer_id == target.kp.id)
            return list(connection.execute(statement))

    def waits(self, placed: Placed) -> bool:
        return any(row.token == placed.token for row in self.rig.outbox(self.kp))

    def wait_placed(self, placed: Placed) -> None:
        wait_for(lambda: not self.waits(placed), timeout_seconds=TIMEOUT_SECONDS)

    def wait_told(self, target: Site) -> None:
        """Until the target has acknowledged everything."""
        wait_for(
            lambda: all(row.peer_id != target.kp.id for row in self.rig.outbox(self.kp)),
            timeout_seconds=TIMEOUT_SECONDS,
        )

    # --- in the place of the target's api

    def records(self) -> dict[bytes, Any]:
        """By keyId what is in this store for this KP."""
        with self.rig.engine.connect() as connection:
            found = connection.execute(select(KEY_RECORDS).where(KEY_RECORDS.c.target_id == self.kp.id))
            return {row.key_id: row for row in found}

    def held(self) -> set[bytes]:
        with self.rig.engine.connect() as connection:
            found = connection.execute(select(STOCK_HELD.c.key_id).where(STOCK_HELD.c.local_id == self.kp.id))
            return set(found.scalars())

    def withdrawn(self) -> set[bytes]:
        with self.rig.engine.connect() as connection:
            found = connection.execute(select(WITHDRAWN_KEYS.c.key_id).where(WITHDRAWN_KEYS.c.local_id == self.kp.id))
            return set(found.scalars())

    def open(self, source: Site, key_id: bytes) -> bytes:
        """The key in clear, as this site's api would hand it out."""
        row = self.records()[key_id]
        with self.rig.engine.connect() as connection:
            sealed = fetch_sealed_wrapping_keys(connection, [row.wrapping_key_id])
        opened = open_wrapping_key(sealed[0], source.kp.identity.public_key, self.epoch_key)
        return opened.open(
            KeyRecord(
                row.key_id,
                row.source_id,
                row.target_id,
                row.size_bits,
                row.expires_ms,
                row.wrapping_key_id,
                row.nonce,
                row.sealed,
                row.correlation_id,
            )
        )


@dataclass
class Placed:
    """Keys that were sealed for a target, and the row that carries them."""

    target: str
    records: list[KeyRecord]
    keys: list[bytes]
    wrapping_key: SealedWrappingKey
    token: bytes = field(default_factory=lambda: secrets.token_bytes(16))

    @property
    def rows(self) -> list[list[Any]]:
        return [record_fields(record) for record in self.records]

    @property
    def ids(self) -> set[bytes]:
        return {record.key_id for record in self.records}

    def payload(self, *, stock: bool = False) -> bytes:
        """What an envelope with these keys says."""
        return SealedKeys([], self.rows, [wrapping_key_fields(self.wrapping_key)], stock).pack()


def seal(
    source: Kp, target: Site, count: int = 1, ttl_ms: int = KEY_TTL_MS, *, signer: Identity | None = None
) -> Placed:
    """Fresh keys of a source, sealed to the target's epoch."""
    opened, sealed = make_wrapping_key(signer or source.identity, source.id, target.kp.id, target.epoch)
    keys = [secrets.token_bytes(32) for _ in range(count)]
    expires_ms = now_ms() + ttl_ms
    records = [opened.seal(secrets.token_bytes(16), key, expires_ms, f"c-{n}") for n, key in enumerate(keys)]
    return Placed(target.kp.id, records, keys, sealed)


class Sites:
    """Sites that share a broker and trust each other over bus links."""

    def __init__(self, root: Path, rabbitmq_url: str) -> None:
        self._root = root
        self._url = rabbitmq_url
        self.sites: list[Site] = []
        self.suffix = secrets.token_hex(3)

    def add(self, name: str, database: Database, *peers: str, **env: str) -> Site:
        """A site whose syncer is not started yet."""
        rig = self._rig(name, database)
        site = Site(rig, rig.add(name, *peers, **{"SKIP_SYNC_TIMEOUT": "2"} | env))
        self.sites.append(site)
        return site

    def add_simulated_peer(self, name: str, database: Database) -> Site:
        """A site that only the test speaks for."""
        rig = self._rig(name, database)
        site = Site(rig, Kp(rig.name(name), Identity.generate()))
        self.sites.append(site)
        return site

    def link(self, *, endpoints: dict[str, tuple[str, Path]] | None = None) -> None:
        """Everybody is everybody's bus peer."""
        for here in self.sites:
            if here.kp.provider is not None:
                others = [there.kp for there in self.sites if there is not here]
                here.kp.process.link_by_bus(*(_bus_peer(other, (endpoints or {}).get(other.id)) for other in others))

    def start(self, *sites: Site) -> None:
        """Until each has the others' announcements."""
        for site in sites:
            site.kp.process.start("syncer")
        for here in sites:
            for there in sites:
                if here is not there:
                    wait_for(lambda a=here, b=there: a.knows(b), timeout_seconds=TIMEOUT_SECONDS)  # type: ignore[misc]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for site in self.sites:
            site.rig.close()

    def _rig(self, name: str, database: Database) -> Rig:
        root = self._root / f"site-{name}"
        root.mkdir()
        rig = Rig(root, database, self._url)
        rig.suffix = self.suffix
        return rig


def _bus_peer(kp: Kp, endpoint: tuple[str, Path] | None) -> BusPeer:
    url, ca_file = endpoint or (None, None)
    return BusPeer(kp.id, identity_line(kp.identity.public_key), 0, url, ca_file)
