"""What an encryptor waits for goes a shorter way through the store: the same effect, or none and the ordinary way."""

from __future__ import annotations

import functools
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import cast

import pytest

from skipbus.services.syncer.at_once import MAX_AT_ONCE
from skipbus.services.syncer.effects import Applied, Effects, Verdict
from skipbus.services.syncer.examination import Accepted
from skipbus.services.syncer.payloads import Acknowledgement, Payload
from skipbus.services.syncer.placed_keys import PlacedKeys
from skipbus.shared.clock import now_ms
from skipbus.shared.errors import StoreRefused
from skipbus.shared.hints import Hint
from skipbus.shared.protocol.envelopes import EnvelopeType, Header
from skipbus.shared.store import relaying
from skipbus.shared.store.engine import connect
from skipbus.shared.store.messages import EnvelopeRow
from skipbus.shared.store.packets import OutboxRow, commit, insert_outbox_rows
from skipbus.shared.store.steps import Statement, Steps, StepsRunner, run_steps
from tests.integration.key_providers import Store

KP, PEER, STRANGER = "KP_Bob", "KP_Carol", "KP_Dora"
WRAPPING_KEY = [b"w" * 16, b"e" * 16, now_ms() + 3_600_000, b"sealed", b"signature"]


@pytest.fixture
async def effects(store: Store) -> AsyncIterator[Effects]:
    """With a wrapping key of the peer's that is known, as it is a moment after the first key."""
    with closing(Effects(store.engine, KP, {PEER}, store.settings.mysql)) as made:
        made.apply([placed(1, [record()])], now_ms(), again=False)
        store.rows("DELETE FROM key_records")
        store.rows("DELETE FROM inbox")
        store.rows("DELETE FROM peers")
        yield made


def accepted(payload: Payload, kind: EnvelopeType, number: int, sender: str = PEER) -> Accepted:
    return Accepted(Header(kind, sender, KP, number, now_ms()), payload, redelivered=False)


def record(key_id: bytes = b"") -> list[object]:
    return [key_id or secrets.token_bytes(16), 256, now_ms() + 60_000, "c", WRAPPING_KEY[0], b"n" * 12, b"s" * 48]


def placed(number: int, records: list[list[object]], *, stock: bool = False) -> Accepted:
    return accepted(PlacedKeys(tuple(records), (WRAPPING_KEY,), stock), EnvelopeType.KEY_ISSUED, number)


def acknowledged(*numbers: int, sender: str = PEER) -> Accepted:
    return accepted(Acknowledgement(numbers), EnvelopeType.KEY_STORED, 99, sender)


async def at_once(effects: Effects, one: Accepted) -> Applied | None:
    return await effects.apply_at_once(one, now_ms(), before_commit=lambda _verdicts: None)


def state(store: Store) -> list[list[tuple[object, ...]]]:
    """All that either way can change, without times."""
    return [
        store.rows("SELECT target_id, source_id, key_id, sealed, correlation_id FROM key_records ORDER BY key_id"),
        store.rows("SELECT local_id, sender_id, envelope_no FROM inbox"),
        store.rows("SELECT local_id, peer_id, issued, inbound_issued, inbound_withdrawn FROM peers"),
        store.rows("SELECT peer_id, type, envelope_no FROM outbox ORDER BY id"),
    ]


def outbox(store: Store, *types: str, items: int = 1) -> list[bytes]:
    """A row for the peer of each type, in envelopes of their own from 1 on; their tokens."""
    tokens = [secrets.token_bytes(16) for _ in types]
    rows = [OutboxRow(KP, PEER, kind, b"\x90", items, now_ms(), one) for kind, one in zip(types, tokens, strict=True)]
    with store.engine.begin() as connection:
        connection.exec_driver_sql(insert_outbox_rows(rows))
    for number, token in enumerate(tokens, 1):
        store.rows("UPDATE outbox SET envelope_no = %s WHERE token = %s", number, token)
    return tokens


# --- the same effect


async def test_keys_are_stored_counted_and_remembered_as_the_ordinary_way_does_it(
    store: Store, effects: Effects
) -> None:
    envelope = placed(7, [record(), record()])
    told: list[Verdict] = []
    done = await effects.apply_at_once(envelope, now_ms(), before_commit=told.extend)
    short = state(store)
    for table in ("key_records", "inbox", "peers"):
        store.rows(f"DELETE FROM {table}")
    ordinary = effects.apply([envelope], now_ms(), again=False)
    assert done == ordinary
    assert short == state(store)
    assert short[2] == [(KP, PEER, 0, 2, 0)]
    assert told == [Verdict.HANDLED]


async def test_an_acknowledgement_takes_rows_away_as_the_ordinary_way_does_it(store: Store, effects: Effects) -> None:
    both: list[tuple[Applied | None, object]] = []

    async def ordinarily(one: Accepted) -> Applied | None:
        return effects.apply([one], now_ms(), again=False)

    apply: list[Callable[[Accepted], Awaitable[Applied | None]]] = [
        functools.partial(at_once, effects),
        ordinarily,
    ]
    for way in apply:
        store.rows("DELETE FROM outbox")
        store.rows("DELETE FROM peers")
        tokens = outbox(store, "key.placed", "key.issued", "key.placed", items=3)
        done = await way(acknowledged(1, 2))
        assert done is not None
        assert done.aftermath.stored == [tokens[0]]
        done.aftermath.stored.clear()
        both.append((done, state(store)))
    assert both[0] == both[1]
    assert store.rows("SELECT issued FROM peers") == [(3,)]


def rows_known(store: Store, effects: Effects, number: int) -> Effects:
    """The same, where this process has numbered the envelope and remembers its rows as they stand now."""
    found = store.rows("SELECT id, type, items, token FROM outbox WHERE envelope_no = %s ORDER BY id", number)
    rows = [EnvelopeRow(int(str(i)), str(kind), int(str(n)), cast("bytes", token)) for i, kind, n, token in found]
    known = {(PEER, number): rows}
    made = Effects(store.engine, KP, {PEER}, store.settings.mysql, lambda *envelope: known.get(envelope, []))
    made._known = effects._known
    return made


@pytest.mark.parametrize("types", [["key.placed"], ["key.placed", "key.placed"], ["key.issued"]])
async def test_rows_that_are_known_are_taken_away_without_a_question(
    store: Store, effects: Effects, types: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = outbox(store, *types, items=3)
    store.rows("UPDATE outbox SET envelope_no = 1")
    (untouched,) = outbox(store, "key.placed")
    store.rows("UPDATE outbox SET envelope_no = 9 WHERE token = %s", untouched)
    with closing(rows_known(store, effects, 1)) as knowing:
        monkeypatch.setattr(relaying, "lock_envelope_rows", lambda *_: pytest.fail("it is asked for its rows"))
        done = await at_once(knowing, acknowledged(1))
    assert done is not None
    placed_rows = sum(kind == "key.placed" for kind in types)
    assert done.aftermath.stored == (tokens if placed_rows else [])
    assert store.rows("SELECT token FROM outbox") == [(untouched,)]
    assert store.rows("SELECT issued FROM peers") == ([(3 * placed_rows,)] if placed_rows else [])


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM outbox WHERE envelope_no = 1 LIMIT 1",
        "UPDATE outbox SET envelope_no = 5 WHERE envelope_no = 1 LIMIT 1",
        "UPDATE outbox SET peer_id = 'KP_Dora' WHERE envelope_no = 1 LIMIT 1",
        "UPDATE outbox SET local_id = 'KP_Dora' WHERE envelope_no = 1 LIMIT 1",
    ],
)
@pytest.mark.parametrize("count", [1, 2])
async def test_rows_that_are_no_longer_as_they_were_known_are_not_counted(
    store: Store, effects: Effects, change: str, count: int
) -> None:
    """One was withdrawn meanwhile, or the store was put back: then what stands there is another row."""
    outbox(store, *["key.placed"] * count)
    store.rows("UPDATE outbox SET envelope_no = 1")
    with closing(rows_known(store, effects, 1)) as knowing:
        store.rows(change)
        await leave(store, knowing, acknowledged(1))


async def test_an_acknowledgement_of_several_envelopes_asks_for_their_rows(store: Store, effects: Effects) -> None:
    tokens = outbox(store, "key.placed", "key.placed")
    with closing(rows_known(store, effects, 1)) as knowing:
        done = await at_once(knowing, acknowledged(1, 2))
    assert done is not None
    assert set(done.aftermath.stored) == set(tokens)
    assert store.count("outbox") == 0


async def test_numbers_that_were_never_sent_acknowledge_nothing(store: Store, effects: Effects) -> None:
    outbox(store, "key.placed")
    before = state(store)
    assert await at_once(effects, acknowledged(17)) is None
    assert await at_once(effects, acknowledged()) is None
    assert state(store) == before


# --- the row that a hint tells of


def told(store: Store, hint: Hint, number: int = 77) -> int | None:
    with closing(StepsRunner(store.settings.mysql)) as runner:
        return runner.run(relaying.commit_told(KP, hint, number))


def test_a_row_that_is_as_it_was_told_is_numbered(store: Store, effects: Effects) -> None:
    del effects
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
def test_a_row_that_is_not_as_it_was_told_is_left_alone(
    store: Store, effects: Effects, column: str, value: object
) -> None:
    del effects
    (token,) = outbox(store, "key.placed")
    store.rows("UPDATE outbox SET envelope_no = NULL")
    store.rows(f"UPDATE outbox SET {column} = %s", value)
    before = store.rows("SELECT * FROM outbox")
    assert told(store, Hint(PEER, token, b"\x90")) is None
    assert store.rows("SELECT * FROM outbox") == before


def test_hostile_text_in_a_hint_is_a_value(store: Store, effects: Effects) -> None:
    del effects
    outbox(store, "key.placed")
    before = store.rows("SELECT * FROM outbox")
    assert told(store, Hint("x' OR 1=1; DROP TABLE outbox; -- ", b"'" * 16, b"'); DELETE FROM outbox; -- ")) is None
    assert store.rows("SELECT * FROM outbox") == before


def test_a_row_that_is_being_committed_is_waited_for(store: Store, effects: Effects) -> None:
    del effects
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


# --- no effect, and the ordinary way


async def leave(store: Store, effects: Effects, one: Accepted) -> None:
    """It is not done at once, changes nothing and locks nothing."""
    before = state(store)
    assert await at_once(effects, one) is None
    assert state(store) == before
    store.rows("DELETE FROM outbox")
    store.rows("DELETE FROM withdrawn_keys")


async def test_an_envelope_that_was_handled_before_is_left_alone(store: Store, effects: Effects) -> None:
    envelope = placed(7, [record()])
    assert await at_once(effects, envelope) is not None
    store.rows("DELETE FROM key_records")
    await leave(store, effects, envelope)


async def test_a_key_that_exists_is_never_overwritten(store: Store, effects: Effects) -> None:
    known = record()
    assert await at_once(effects, placed(7, [known])) is not None
    known[-1] = b"x" * 48
    await leave(store, effects, placed(8, [record(), known]))


async def test_a_key_that_its_source_has_taken_back_is_not_stored(store: Store, effects: Effects) -> None:
    taken_back = [record(), record()]
    for one in taken_back:
        store.rows("INSERT INTO withdrawn_keys VALUES (%s, %s, %s, %s)", KP, PEER, one[0], now_ms() + 60_000)
    await leave(store, effects, placed(7, [record(), taken_back[0]]))
    for one in taken_back:
        store.rows("INSERT INTO withdrawn_keys VALUES (%s, %s, %s, %s)", KP, PEER, one[0], now_ms() + 60_000)
    await leave(store, effects, placed(7, taken_back))


async def test_what_another_source_has_taken_back_keeps_no_key_away(store: Store, effects: Effects) -> None:
    mine = record()
    store.rows("INSERT INTO withdrawn_keys VALUES (%s, %s, %s, %s)", KP, STRANGER, mine[0], now_ms() + 60_000)
    assert await at_once(effects, placed(7, [mine])) is not None
    assert store.count("key_records") == 1


async def test_keys_under_a_wrapping_key_that_is_not_known_are_left(store: Store, effects: Effects) -> None:
    other = [b"v" * 16, *WRAPPING_KEY[1:]]
    payload = PlacedKeys((record(),), (other,), stock=False)
    await leave(store, effects, accepted(payload, EnvelopeType.KEY_ISSUED, 7))


async def test_stock_and_bulk_are_left(store: Store, effects: Effects) -> None:
    await leave(store, effects, placed(7, [record()], stock=True))
    await leave(store, effects, placed(7, [record() for _ in range(MAX_AT_ONCE + 1)]))
    await leave(store, effects, acknowledged(*range(1, MAX_AT_ONCE + 2)))


async def test_an_acknowledgement_of_stock_is_left_and_holds_no_lock(store: Store, effects: Effects) -> None:
    outbox(store, "key.placed", "key.stocked")
    await leave(store, effects, acknowledged(1, 2))


async def test_a_peer_of_the_same_store_is_left_to_the_ordinary_way(store: Store, effects: Effects) -> None:
    await leave(store, effects, acknowledged(1, sender=STRANGER))


async def test_after_a_refusal_the_next_one_goes_at_once_over_the_same_connection(
    store: Store, effects: Effects
) -> None:
    envelope = placed(7, [record()])
    assert await at_once(effects, envelope) is not None
    (before,) = store.rows("SHOW STATUS LIKE 'Connections'")
    for _ in range(20):
        assert await at_once(effects, envelope) is None
    assert await at_once(effects, placed(8, [record()])) is not None
    (after,) = store.rows("SHOW STATUS LIKE 'Connections'")
    assert int(str(after[1])) - int(str(before[1])) < 20


async def test_a_store_that_went_away_is_left_to_the_ordinary_way_once(store: Store, effects: Effects) -> None:
    assert await at_once(effects, placed(7, [record()])) is not None
    for (connection_id,) in store.rows("SELECT id FROM information_schema.processlist WHERE id <> CONNECTION_ID()"):
        store.rows(f"KILL {connection_id}")
    assert await at_once(effects, placed(8, [record()])) is None
    assert await at_once(effects, placed(8, [record()])) is not None


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
