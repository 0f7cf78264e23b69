"""Facts about migrations: many processes at once, half-made tables, and that they make what the schema says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import skipbus.shared.store.migrate
from sandbox.mariadb import Database, MariaDbServer
from skipbus.shared.errors import StoreRefused
from skipbus.shared.settings import MySqlSettings
from skipbus.shared.store.engine import connect, make_engine
from skipbus.shared.store.migrate import (
    HEAD_REVISION,
    StoreNewer,
    bring_up_to_date,
    is_known,
    store_revision,
    upgrade_store,
)
from skipbus.shared.store.schema import METADATA

ROOT = Path(__file__).parents[2]
UPGRADE = """
import sys
from skipbus.shared.settings import MySqlSettings
from skipbus.shared.store.migrate import upgrade_store
from skipbus.shared.settings import Secret
host, port, user, password, database = sys.stdin.read().split()
print(upgrade_store(MySqlSettings(host, int(port), user, Secret(password), database)))
"""


@pytest.fixture
def mysql(database: Database) -> MySqlSettings:
    return database.settings


@pytest.fixture
def second_database(mariadb: MariaDbServer) -> Iterator[Database]:
    with mariadb.databases("second_schema") as (made,):
        yield made


def query(mysql: MySqlSettings, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
    connection = connect(mysql)
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            rows = list(cursor.fetchall())
        connection.commit()
        return rows
    finally:
        connection.close()


def tables(mysql: MySqlSettings) -> set[str]:
    return {row[0] for row in query(mysql, "SHOW TABLES")}


def start_upgrade(mysql: MySqlSettings) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", UPGRADE],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    # The password goes in by a pipe: a command line can be read by everybody.
    process.stdin.write(f"{mysql.host} {mysql.port} {mysql.user} {mysql.password.reveal()} {mysql.database}")
    process.stdin.close()
    process.stdin = None
    return process


def test_eight_processes_that_start_at_once_on_an_empty_store_migrate_it_once(mysql: MySqlSettings) -> None:
    processes = [start_upgrade(mysql) for _ in range(8)]
    ends = [process.communicate(timeout=90) for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, ends
    assert sorted(out.strip() for out, _ in ends) == ["False"] * 7 + ["True"], ends
    assert store_revision(mysql) == HEAD_REVISION
    assert set(METADATA.tables) | {"alembic_version"} == tables(mysql)


def test_an_empty_store_has_no_revision_and_a_migrated_one_the_head(mysql: MySqlSettings) -> None:
    assert store_revision(mysql) is None
    assert upgrade_store(mysql)
    assert store_revision(mysql) == HEAD_REVISION
    assert not upgrade_store(mysql)


def test_a_migration_that_died_half_way_is_finished_by_the_next(mysql: MySqlSettings) -> None:
    upgrade_store(mysql)
    query(mysql, "INSERT INTO inbox VALUES ('KP_Alice', 'KP_Bob', 7, 7)")
    # Statements that change tables commit one by one: some tables are there, the revision is not.
    query(mysql, "DROP TABLE processes, outbox, key_records")
    query(mysql, "DELETE FROM alembic_version")
    assert store_revision(mysql) is None
    assert upgrade_store(mysql)
    assert store_revision(mysql) == HEAD_REVISION
    assert set(METADATA.tables) <= tables(mysql)
    assert query(mysql, "SELECT envelope_no FROM inbox") == [(7,)]


COLUMNS = """
    SELECT table_name, column_name, ordinal_position, column_type, is_nullable, column_default, extra,
           character_set_name, collation_name
    FROM information_schema.columns WHERE table_schema = %s AND table_name <> 'alembic_version' ORDER BY 1, 3
"""
INDEXES = """
    SELECT table_name, index_name, seq_in_index, column_name, non_unique, sub_part, nullable, collation
    FROM information_schema.statistics WHERE table_schema = %s AND table_name <> 'alembic_version' ORDER BY 1, 2, 3
"""
ENGINES = """
    SELECT table_name, engine, table_collation, row_format
    FROM information_schema.tables WHERE table_schema = %s AND table_name <> 'alembic_version' ORDER BY 1
"""


@pytest.mark.parametrize("question", [COLUMNS, INDEXES, ENGINES], ids=["columns", "indexes", "engines"])
def test_the_migrations_make_what_the_schema_describes(
    mysql: MySqlSettings, second_database: Database, question: str
) -> None:
    upgrade_store(mysql)
    described = second_database.settings
    engine = make_engine(described)
    METADATA.create_all(engine)
    engine.dispose()
    made = query(mysql, question, mysql.database)
    assert made == query(described, question, described.database)
    assert {row[0] for row in made} == set(METADATA.tables)


def test_ids_are_compared_byte_by_byte_and_case_sensitively(mysql: MySqlSettings) -> None:
    upgrade_store(mysql)
    columns = query(mysql, COLUMNS, mysql.database)
    ids = [row for row in columns if row[1].endswith("_id") and row[3].startswith("varchar")]
    assert len(ids) >= 15
    assert {row[8] for row in ids} <= {"utf8mb4_bin", "ascii_bin"}


def test_times_are_unsigned_64_bit_milliseconds(mysql: MySqlSettings) -> None:
    upgrade_store(mysql)
    times = [row for row in query(mysql, COLUMNS, mysql.database) if row[1].endswith("_ms")]
    others = {row[1] for row in times if not row[3].startswith("bigint")}
    # An interval is no time, and a clock may be behind another as well as ahead.
    assert others == {"heartbeat_interval_ms", "clock_skew_ms"}


def test_a_store_of_a_newer_release_is_left_as_it_is_and_used(
    mysql: MySqlSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    upgrade_store(mysql)
    query(mysql, "UPDATE alembic_version SET version_num = '9999'")
    query(mysql, "ALTER TABLE inbox ADD COLUMN of_the_future INT NULL")
    assert not is_known("9999")
    with pytest.raises(StoreNewer, match="9999"):
        upgrade_store(mysql)
    bring_up_to_date(mysql)
    assert "store is newer" in capsys.readouterr().out
    assert store_revision(mysql) == "9999"
    assert ("of_the_future",) in query(
        mysql, "SELECT column_name FROM information_schema.columns WHERE table_schema = %s", mysql.database
    )


def test_a_store_that_is_up_to_date_is_only_read(mariadb: MariaDbServer, mysql: MySqlSettings) -> None:
    upgrade_store(mysql)
    with mariadb.admin_connection() as connection, connection.cursor() as cursor:
        cursor.execute(f"REVOKE ALL PRIVILEGES ON `{mysql.database}`.* FROM '{mysql.user}'@'%'")
        cursor.execute(f"GRANT SELECT ON `{mysql.database}`.* TO '{mysql.user}'@'%'")
    assert not upgrade_store(mysql)


def test_an_account_that_may_not_change_tables_is_told_so_on_an_empty_store(
    mariadb: MariaDbServer, mysql: MySqlSettings
) -> None:
    with mariadb.admin_connection() as connection, connection.cursor() as cursor:
        cursor.execute(f"REVOKE ALL PRIVILEGES ON `{mysql.database}`.* FROM '{mysql.user}'@'%'")
        cursor.execute(f"GRANT SELECT, INSERT ON `{mysql.database}`.* TO '{mysql.user}'@'%'")
    with pytest.raises(StoreRefused):
        upgrade_store(mysql)


def test_every_revision_of_this_release_is_known() -> None:
    assert is_known(None)
    assert is_known(HEAD_REVISION)
    assert not is_known("0000")


def test_the_revision_that_processes_look_for_is_the_last_migration() -> None:
    migrations = Path(skipbus.shared.store.migrate.__file__).parent / "migrations" / "versions"
    assert max(path.name.split("_")[0] for path in migrations.glob("[0-9]*.py")) == HEAD_REVISION


def test_an_empty_store_is_migrated_by_whoever_starts(mysql: MySqlSettings, capsys: pytest.CaptureFixture[str]) -> None:
    bring_up_to_date(mysql)
    assert store_revision(mysql) == HEAD_REVISION
    bring_up_to_date(mysql)
    assert capsys.readouterr().out.count("store migrated") == 1


@pytest.mark.parametrize("process", ["api", "syncer", "janitor"])
def test_a_process_starts_without_what_only_migrations_need(process: str) -> None:
    command = f"import sys, skipbus.services.{process}.__main__; sys.exit('alembic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], timeout=60, check=False).returncode == 0
