"""A reader of MySQL who copies every table at both sites, all the time, and every message of the broker with them.

He sees keys on demand and out of stock from their making to their retrieval, at the source and at the target, and
finds none of them, nor a private key.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from sandbox.mariadb import Database, MariaDbServer
from sandbox.rabbitmq import RabbitMqServer
from tests.system.attack_scene import Scene, attack_scene
from tests.system.bus_links import wait_stock
from tests.system.harness import in_background, query

STOCK = 16
TABLES = {"key_records", "wrapping_keys", "outbox", "stock", "stock_held", "bus_announcements", "withdrawn_keys"}


@pytest.fixture(scope="module")
def scene(
    tmp_path_factory: pytest.TempPathFactory, mariadb: MariaDbServer, rabbitmq: RabbitMqServer
) -> Iterator[Scene]:
    with attack_scene(tmp_path_factory.mktemp("store"), mariadb, rabbitmq, stock=STOCK) as made:
        wait_stock(made.alice, made.bob_id, STOCK)
        wait_stock(made.bob, made.alice_id, STOCK)
        yield made


class Reader:
    """Copies every row of every table of some databases, again and again."""

    def __init__(self, *databases: Database) -> None:
        self._databases = databases
        self.cells: set[bytes] = set()
        self.copies = 0

    def read(self, stop: threading.Event) -> None:
        while not stop.is_set():
            for database in self._databases:
                self._copy(database)
            self.copies += 1

    def _copy(self, database: Database) -> None:
        with database.connect() as store:
            tables = [name for (name,) in query(store, "SHOW TABLES")]
            assert set(tables) >= TABLES
            for table in tables:
                for row in query(store, f"SELECT * FROM `{table}`"):
                    self.cells.update(cell if isinstance(cell, bytes) else str(cell).encode() for cell in row)


def test_a_mysql_reader_who_copies_every_table_at_both_sites_learns_no_key(
    scene: Scene, mariadb: MariaDbServer
) -> None:
    reader = Reader(scene.alices.database, scene.bobs.database)
    keys = []
    with in_background(reader.read):
        for round_number in range(20):
            for size in ("256", "128", "512"):
                keys.append(scene.lab.issue(scene.alice, scene.bob_id, size))
                keys.append(scene.lab.issue(scene.bob, scene.alice_id, size))
            if round_number % 2:
                for key in keys[-6:]:
                    scene.lab.assert_retrievable(key)
    assert reader.copies >= 5
    copied = b"\n".join(reader.cells)
    # He has the keyIds, so what he copied is what was there.
    seen = [key for key in keys if bytes.fromhex(key.key_id) in reader.cells]
    assert len(seen) > len(keys) / 4
    assert scene.lab.needles().found_in(copied) == []
    with mariadb.admin_connection() as connection:
        connection.cursor().execute("FLUSH TABLES")
    for place in (scene.alices, scene.bobs):
        files = [file for file in (mariadb.datadir / place.database.database).iterdir() if file.is_file()]
        assert files
        assert scene.lab.needles().found_in_files(files) == []
