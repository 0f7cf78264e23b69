"""The row that a hint tells of, and what is done while the server works."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from skipbus.shared.clock import now_ms
from skipbus.shared.errors import StoreRefused
from skipbus.shared.hints import Hint
from skipbus.shared.store import relaying
from skipbus.shared.store.engine import connect
from skipbus.shared.store.packets import OutboxRow, commit, insert_outbox_rows
from skipbus.shared.store.steps import Statement, Steps, StepsRunner, run_steps
from tests.integration.key_providers import Store

KP, PEER = "KP_Bob", "KP_Carol"


def outbox(store: Store, *types: str, items: int = 1) -> list[bytes]:
    """A row for the peer of each type, in envelopes of their own from 1 on; their tokens."""
    tokens = [secrets.token_bytes(16) for _ in types]
    rows = [OutboxRow(KP, PEER, kind, b"\x90", items, now_ms(), one) for kind, one in zip(types, tokens, strict=True)]
    with store.engine.begin() as connection:
        connection.exec_driver_sql(insert_outbox_rows(rows))
    for number, token in enumerate(tokens, 1):
        store.rows("UPDATE outbox SET envelope_no = %s WHERE token = %s", number, token)
    return tokens


# --- the row that a hint tells of


def told(store: Store, hint: Hint, number: int = 77) -> int | None:
    with closing(StepsRunner(store.settings.mysql)) as runner:
        return runner.run(relaying.commit_told(KP, hint, number))


def test_a_row_that_is_as_it_was_told_is_numbered(store: Store) -> None:
    tokens = outbox(store, "key.placed", "key.placed")
    store.rows("UPDATE outbox SET envelope_no = NULL")
    row_id = told(store, Hint(PEER, tokens[0], b"\x90"))
    assert store.rows("SELECT id, token FROM outbox WHERE envelope_no = 77") == [(row_id, tokens[0])]
    # Once: whoever is told again finds that it is done.
    assert told(store, Hint(PEER, tokens[0], b"\x90"), 78) is None
    assert store.rows("SELECT token FROM outbox WHERE envelope_no IS NULL") == [(tokens[1],)]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("local_id", "KP_Dora"),
        ("peer_id", "KP_Dora"),
        ("type", "key.stocked"),
        ("items", 2),
        ("payload", b"\x91"),
        ("token", b"u" * 16),
        ("envelope_no", 5),
        ("sent_ms", 5),
    ],
)
def test_a_row_that_is_not_as_it_was_told_is_left_alone(store: Store, column: str, value: object) -> None:
    (token,) = outbox(store, "key.placed")
    store.rows("UPDATE outbox SET envelope_no = NULL")
    store.rows(f"UPDATE outbox SET {column} = %s", value)
    before = store.rows("SELECT * FROM outbox")
    assert told(store, Hint(PEER, token, b"\x90")) is None
    assert store.rows("SELECT * FROM outbox") == before


def test_hostile_text_in_a_hint_is_a_value(store: Store) -> None:
    outbox(store, "key.placed")
    before = store.rows("SELECT * FROM outbox")
    assert told(store, Hint("x' OR 1=1; DROP TABLE outbox; -- ", b"'" * 16, b"'); DELETE FROM outbox; -- ")) is None
    assert store.rows("SELECT * FROM outbox") == before


def test_a_row_that_is_being_committed_is_waited_for(store: Store) -> None:
    token = secrets.token_bytes(16)
    with closing(connect(store.settings.mysql)) as writer, ThreadPoolExecutor() as pool:
        with writer.cursor() as cursor:
            cursor.execute(insert_outbox_rows([OutboxRow(KP, PEER, "key.placed", b"\x90", 1, now_ms(), token)]))
        numbering = pool.submit(told, store, Hint(PEER, token, b"\x90"))
        with pytest.raises(TimeoutError):
            numbering.result(0.3)
        writer.commit()
        row_id = numbering.result(10)
    assert store.rows("SELECT id FROM outbox WHERE envelope_no = 77") == [(row_id,)]


# --- what is done while the server works


def counted(store: Store) -> int:
    return store.count("outbox")


def insert(token: bytes) -> str:
    return insert_outbox_rows([OutboxRow(KP, PEER, "key.placed", b"\x90", 1, now_ms(), token)])


def test_a_row_of_any_length_is_read(store: Store) -> None:
    """Older rows may be longer than what a lane of the api reads."""
    payload = secrets.token_bytes(3 * 2**20)
    with closing(StepsRunner(store.settings.mysql)) as runner:
        runner.run(commit([insert_outbox_rows([OutboxRow(KP, PEER, "key.withdrawn", payload, 9, now_ms())])]))
        (row_id,) = (int(str(row[0])) for row in store.rows("SELECT id FROM outbox"))
        assert runner.run(relaying.fetch_claimed_payloads([row_id])) == [payload]
        (claimed,) = runner.run(relaying.claim_unnumbered(KP, 5))
        assert (claimed.payload, claimed.payload_bytes) == (None, len(payload))
        runner.run(commit([]))


def test_what_is_done_meanwhile_is_done_once_and_the_statements_are_committed(store: Store) -> None:
    done: list[int] = []
    with closing(connect(store.settings.mysql, several_statements=True)) as connection:
        steps = commit([insert(b"a" * 16), insert(b"b" * 16)], lambda: done.append(1))
        run_steps(connection, steps)
        run_steps(connection, commit([insert(b"c" * 16)]))
    assert (done, counted(store)) == ([1], 3)


def test_an_error_of_the_last_statement_is_not_missed(store: Store) -> None:
    with closing(StepsRunner(store.settings.mysql)) as runner:
        with pytest.raises(StoreRefused):
            runner.run(commit([insert(b"a" * 16), insert(b"a" * 16)], lambda: None))
        assert counted(store) == 0
        runner.run(commit([insert(b"b" * 16)], lambda: None))
    assert counted(store) == 1


def test_where_what_is_done_meanwhile_fails_the_connection_is_made_anew(store: Store) -> None:
    def fail() -> None:
        raise ValueError("signing")

    def one() -> Steps[int]:
        rows = yield Statement("SELECT 1", (int,))
        return int(rows[0][0])

    with closing(StepsRunner(store.settings.mysql)) as runner:
        with pytest.raises(ValueError, match="signing"):
            runner.run(commit([insert(b"a" * 16)], fail))
        assert runner.run(one()) == 1
