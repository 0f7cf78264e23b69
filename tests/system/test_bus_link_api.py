"""Facts about a bus link as an encryptor sees it, with KP_Alice's api running and everything beyond it simulated."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from sandbox.client import get
from sandbox.mariadb import MariaDbServer
from sandbox.rabbitmq import RabbitMqServer
from skipbus.shared.broker.notifications import NotificationKind
from tests.system.bus_links import sealed_keys
from tests.system.conftest import new_lab
from tests.system.harness import ask
from tests.system.stub_link import CAROL, StubLink, stopwatch
from tests.waiting import wait_for

NewLink: TypeAlias = Callable[..., StubLink]


def new_links(root: Path, mariadb: MariaDbServer, rabbitmq: RabbitMqServer) -> Iterator[NewLink]:
    with ExitStack() as at_end:

        def make(**options: Any) -> StubLink:  # noqa: ANN401 -- those of StubLink, handed through
            made = StubLink(at_end.enter_context(new_lab(root / secrets.token_hex(4), mariadb, rabbitmq)), **options)
            at_end.callback(made.close)
            made.start()
            return made

        yield make


@pytest.fixture
def new_link(tmp_path: Path, mariadb: MariaDbServer, rabbitmq: RabbitMqServer) -> Iterator[NewLink]:
    """A link of this test's own, with its own options."""
    yield from new_links(tmp_path, mariadb, rabbitmq)


@pytest.fixture(scope="module")
def shared_link(
    tmp_path_factory: pytest.TempPathFactory, mariadb: MariaDbServer, rabbitmq: RabbitMqServer
) -> Iterator[NewLink]:
    """A link that several tests use."""
    yield from new_links(tmp_path_factory.mktemp("links"), mariadb, rabbitmq)


@pytest.fixture(scope="module")
def link(shared_link: NewLink) -> StubLink:
    """Without stock: everything goes on demand."""
    return shared_link(SKIP_SYNC_TIMEOUT="2")


@pytest.fixture(scope="module")
def patient(shared_link: NewLink) -> StubLink:
    """Without stock, and with waits that no test sees the end of."""
    return shared_link(SKIP_SYNC_TIMEOUT="30", SKIP_RETRIEVE_WAIT="20")


@pytest.fixture(scope="module")
def stocked(shared_link: NewLink) -> StubLink:
    """With stock that Carol has acknowledged."""
    made = shared_link(stock=40)
    made.store_all("key.stocked")
    wait_for(lambda: made.status()["stock"]["placed"] == 40, timeout_seconds=10)
    return made


@pytest.fixture(scope="module")
def unacknowledged(shared_link: NewLink) -> StubLink:
    """With stock that Carol never acknowledges."""
    made = shared_link(stock=10, SKIP_SYNC_TIMEOUT="0.5")
    made.wait_outbox("key.stocked")
    wait_for(lambda: made.status()["stock"]["in_flight"] == 10, timeout_seconds=10)
    return made


@pytest.fixture(autouse=True)
def empty_outbox(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in {"link", "patient"} & set(request.fixturenames):
        request.getfixturevalue(name).rows("DELETE FROM outbox")


# --- on demand


def test_a_key_is_answered_only_once_the_peer_has_acknowledged_it(link: StubLink) -> None:
    asking = link.asking()
    ((token, ((key_id, *_),)),) = link.wait_outbox("key.placed")
    time.sleep(0.4)
    assert not asking.done()
    link.acknowledge(token)
    link.notify(NotificationKind.STORED, token)
    answer = asking.result(10)
    assert answer.status == 200
    assert answer.body["keyId"] == key_id.hex()


@pytest.mark.parametrize("size", ["128", "256", "264", "512"])
def test_a_key_of_any_size_opens_at_the_peer_as_it_was_answered(link: StubLink, size: str) -> None:
    asking = link.asking(size=size)
    ((_, (entry,)),) = link.store_all("key.placed")
    answer = asking.result(10)
    assert answer.status == 200
    assert (entry[0].hex(), link.opened(entry).hex()) == (answer.body["keyId"], answer.body["key"])
    assert len(answer.body["key"]) * 4 == int(size)


def test_a_forged_notification_is_not_taken_for_an_acknowledgement(link: StubLink) -> None:
    asking = link.asking()
    ((token, _),) = link.wait_outbox("key.placed")
    for _ in range(5):
        link.notify(NotificationKind.STORED, token)
        time.sleep(0.1)
    assert not asking.done()
    assert asking.result(10).status == 500


def test_a_key_that_the_peer_does_not_store_in_time_is_withdrawn_and_answered_500(link: StubLink) -> None:
    seconds = stopwatch()
    asking = link.asking()
    ((_, ((key_id, _, expires_ms, correlation_id, *_),)),) = link.wait_outbox("key.placed")
    answer = asking.result(10)
    assert 1.9 < seconds() < 4
    assert answer.status == 500
    assert CAROL in answer.error
    assert "2 s" in answer.error
    assert link.outbox("key.placed") == []
    ((_, withdrawn),) = link.outbox("key.withdrawn")
    assert withdrawn == [[key_id, expires_ms, correlation_id]]


def test_a_key_that_was_withdrawn_is_never_answered_though_an_acknowledgement_comes(link: StubLink) -> None:
    asking = link.asking()
    ((token, _),) = link.wait_outbox("key.placed")
    assert asking.result(10).status == 500
    link.notify(NotificationKind.STORED, token)
    assert len(link.outbox("key.withdrawn")) == 1


def test_without_any_notification_an_acknowledgement_is_seen_within_a_second(link: StubLink) -> None:
    asking = link.asking()
    ((token, _),) = link.wait_outbox("key.placed")
    link.acknowledge(token)
    seconds = stopwatch()
    assert asking.result(10).status == 200
    assert seconds() < 1.5


def test_many_callers_share_rows_and_each_gets_the_key_that_the_peer_has(link: StubLink) -> None:
    with link.storing("key.placed") as seen:
        answers = [caller.result(20) for caller in [link.asking() for _ in range(200)]]
    assert [answer.status for answer in answers] == [200] * 200
    at_peer = {entry[0].hex(): link.opened(entry).hex() for entry in seen}
    assert {answer.body["keyId"]: answer.body["key"] for answer in answers} == at_peer
    assert len(at_peer) == 200
    assert len(link.rows("SELECT 1 FROM wrapping_keys WHERE target_id = %s", CAROL)) == 1


def test_a_rejected_envelope_is_answered_at_once_and_its_keys_are_withdrawn(patient: StubLink) -> None:
    seconds = stopwatch()
    asking = patient.asking()
    ((token, ((key_id, *_),)),) = patient.wait_outbox("key.placed")
    patient.notify(NotificationKind.REJECTED, token)
    answer = asking.result(20)
    assert seconds() < 5
    assert answer.status == 500
    assert CAROL in answer.error
    assert patient.key_ids("key.withdrawn") == [key_id]


def test_a_refusal_that_is_forged_does_not_undo_an_acknowledgement(link: StubLink) -> None:
    asking = link.asking()
    ((token, _),) = link.wait_outbox("key.placed")
    link.acknowledge(token)
    link.notify(NotificationKind.REJECTED, token)
    assert asking.result(10).status == 200
    assert link.outbox("key.withdrawn") == []


def test_a_peer_that_has_not_announced_itself_is_named_in_the_refusal(link: StubLink) -> None:
    link.rows("DELETE FROM bus_announcements")
    wait_for(lambda: not link.status()["announced"], timeout_seconds=15)
    answer = link.ask()
    assert answer.status == 500
    assert f"skipctl peer check {CAROL}" in answer.error
    assert link.outbox("key.placed") == []
    link.announce()
    wait_for(lambda: link.status()["announced"], timeout_seconds=15)


def test_when_the_api_stops_a_caller_who_waits_is_still_answered(patient: StubLink) -> None:
    asking = patient.asking()
    ((token, _),) = patient.wait_outbox("key.placed")
    patient.alice.processes["api"].terminate()
    time.sleep(0.5)
    patient.acknowledge(token)
    patient.notify(NotificationKind.STORED, token)
    assert asking.result(10).status == 200
    patient.alice.stop("api")
    patient.start()


# --- stock


def test_stock_is_filled_up_to_its_high_mark_opens_at_the_peer_and_is_nowhere_in_clear(new_link: NewLink) -> None:
    link = new_link(stock=20)
    rows = link.store_all("key.stocked")
    entries = [entry for _, of_row in rows for entry in of_row]
    assert len(entries) == 20
    wait_for(lambda: link.status()["stock"]["placed"] == 20, timeout_seconds=10)
    assert_nothing_stands_in_clear(link, [link.opened(entry) for entry in entries])
    answer = link.ask()
    at_peer = {entry[0].hex(): entry for entry in entries}
    assert link.opened(at_peer[answer.body["keyId"]]).hex() == answer.body["key"]


def assert_nothing_stands_in_clear(link: StubLink, keys: list[bytes]) -> None:
    dump = b"".join(
        bytes(column)
        for table in ("stock", "outbox", "key_records", "wrapping_keys")
        for row in link.rows(f"SELECT * FROM {table}")
        for column in row
        if isinstance(column, bytes)
    )
    assert len(dump) > 500
    assert not any(key[start : start + 8] in dump for key in keys for start in (0, 12, 24))


def test_stock_serves_while_peer_and_broker_are_away_and_leaves_an_event_for_the_peer(new_link: NewLink) -> None:
    link = new_link(stock=16, broker=False)
    link.store_all("key.stocked")
    wait_for(lambda: link.status()["stock"]["placed"] == 16, timeout_seconds=10)
    seconds = stopwatch()
    answers = [link.ask() for _ in range(16)]
    assert seconds() < 3
    assert [answer.status for answer in answers] == [200] * 16
    assert {bytes.fromhex(answer.body["keyId"]) for answer in answers} == set(link.key_ids("key.issued"))
    assert len({answer.body["key"] for answer in answers}) == 16
    assert link.rows("SELECT COUNT(*) FROM stock WHERE placed_ms IS NOT NULL") == ((0,),)


def test_an_api_that_lost_its_broker_says_what_that_costs_and_one_without_a_broker_says_nothing(
    new_link: NewLink,
) -> None:
    link = new_link(broker=False)
    (warning,) = get(link.alice.url, "health").body["warnings"]
    assert "no broker connection: keys on demand can take 1 s longer, and POST /sync answers 503" in warning
    link.alice.stop("api")
    del link.alice.environ["RABBITMQ_URL_FILE"]
    link.start()
    assert get(link.alice.url, "health").body["warnings"] == []


def test_status_shows_the_link_and_its_stock(unacknowledged: StubLink) -> None:
    shown = unacknowledged.status()
    assert shown["link"] == "bus"
    assert shown["stock"] == {"configured": 10, "low": 5, "placed": 0, "in_flight": 10, "held": 0}
    assert (shown["last_refusal"], shown["last_refusal_at"], shown["withdrawn"]) == ("", None, 0)


def test_stock_that_the_peer_has_not_acknowledged_is_never_given_out(unacknowledged: StubLink) -> None:
    assert unacknowledged.ask().status == 500
    assert unacknowledged.rows("SELECT COUNT(*) FROM stock") == ((10,),)


def test_a_peer_that_never_acknowledges_gets_no_more_than_the_high_mark(unacknowledged: StubLink) -> None:
    for _ in range(5):
        unacknowledged.notify(NotificationKind.STOCK)
        time.sleep(1)
    assert len(unacknowledged.key_ids("key.stocked")) == 10


def test_two_api_processes_never_give_out_the_same_key(new_link: NewLink) -> None:
    link = new_link(stock=400, SKIP_API_WORKERS="2")
    with link.storing("key.stocked", "key.placed"):
        wait_for(lambda: link.status()["stock"]["placed"] == 400, timeout_seconds=20)
        answers = [caller.result(30) for caller in [link.asking() for _ in range(600)]]
    assert [answer.status for answer in answers] == [200] * 600
    assert len({answer.body["keyId"] for answer in answers}) == 600
    assert len(link.key_ids("key.issued")) >= 200


def test_another_size_than_the_default_goes_on_demand_and_leaves_the_stock_alone(stocked: StubLink) -> None:
    asking = stocked.asking(size="512")
    stocked.store_all("key.placed")
    assert asking.result(10).status == 200
    assert stocked.rows("SELECT COUNT(*) FROM stock WHERE placed_ms IS NOT NULL") == ((40,),)


def test_stock_is_made_anew_at_the_low_mark(stocked: StubLink) -> None:
    for _ in range(19):
        assert stocked.ask().status == 200
    assert stocked.outbox("key.stocked") == []
    assert stocked.ask().status == 200
    ((_, entries),) = stocked.store_all("key.stocked")
    assert len(entries) == 20


def test_a_copy_that_was_moved_to_another_peer_does_not_open_and_is_withdrawn(new_link: NewLink) -> None:
    link = new_link(stock=2)
    link.store_all("key.stocked")
    wait_for(lambda: link.status()["stock"]["placed"] == 2, timeout_seconds=10)
    # Somebody who can write to the store takes keys of another peer for Carol's: here, any other ciphertext does.
    (first,) = link.rows("SELECT key_id FROM stock ORDER BY key_id LIMIT 1")
    link.rows("UPDATE stock SET sealed = %s WHERE key_id = %s", secrets.token_bytes(48), first[0])
    with link.storing("key.placed"):
        answers = [link.ask() for _ in range(2)]
    assert [answer.status for answer in answers] == [200, 200]
    assert first[0].hex() not in {answer.body["keyId"] for answer in answers}
    assert link.key_ids("key.withdrawn") == [first[0]]


def test_stock_with_less_than_half_of_its_life_left_is_not_given_out(new_link: NewLink) -> None:
    link = new_link(stock=4, SKIP_KEY_TTL_SECONDS="20", SKIP_EPOCH_SECONDS="10")
    link.store_all("key.stocked")
    wait_for(lambda: link.status()["stock"]["placed"] == 4, timeout_seconds=10)
    old = {row[0] for row in link.rows("SELECT key_id FROM stock")}
    # Its successors are made before it is too old to be given out; they are not acknowledged here.
    link.wait_outbox("key.stocked", timeout_seconds=15)
    wait_for(lambda: link.status()["stock"]["placed"] == 0, timeout_seconds=15)
    time.sleep(1.5)
    with link.storing("key.placed"):
        assert bytes.fromhex(link.ask().body["keyId"]) not in old


# --- retrieval


def test_a_key_that_is_asked_for_before_it_has_come_is_answered_when_it_comes(patient: StubLink) -> None:
    load = sealed_keys(patient.carol, patient.alice, patient.lab.places[0])
    asking = patient.retrieving(load.records[0][0])
    time.sleep(0.5)
    assert not asking.done()
    patient.bring(load)
    patient.notify(NotificationKind.ARRIVED, load.records[0][0])
    seconds = stopwatch()
    answer = asking.result(10)
    assert seconds() < 3
    assert (answer.status, answer.body.get("key")) == (200, load.keys[0].key)


def test_without_any_notification_a_key_that_has_arrived_is_found_at_the_deadline(link: StubLink) -> None:
    load = sealed_keys(link.carol, link.alice, link.lab.places[0])
    asking = link.retrieving(load.records[0][0])
    time.sleep(0.3)
    link.bring(load)
    assert asking.result(10).status == 200


def test_a_key_that_never_comes_is_refused_after_the_wait(link: StubLink) -> None:
    seconds = stopwatch()
    key_id = secrets.token_bytes(16)
    asking = link.retrieving(key_id)
    for _ in range(10):
        link.notify(NotificationKind.ARRIVED, key_id)
    assert asking.result(10).status == 400
    assert 0.9 < seconds() < 3


def test_a_key_that_is_there_is_answered_at_once_and_only_once(link: StubLink) -> None:
    load = sealed_keys(link.carol, link.alice, link.lab.places[0])
    link.bring(load)
    seconds = stopwatch()
    answers = [caller.result(10) for caller in [link.retrieving(load.records[0][0]) for _ in range(20)]]
    assert sorted(answer.status for answer in answers) == [200] + [400] * 19
    assert seconds() < 4


def test_waiting_for_keys_keeps_nobody_else_from_the_store(new_link: NewLink) -> None:
    link = new_link(SKIP_RETRIEVE_WAIT="4")
    waiting = [link.retrieving(secrets.token_bytes(16)) for _ in range(60)]
    time.sleep(0.5)
    load = sealed_keys(link.carol, link.alice, link.lab.places[0])
    link.bring(load)
    seconds = stopwatch()
    assert link.retrieving(load.records[0][0]).result(10).status == 200
    assert seconds() < 1
    connections = link.rows(
        "SELECT COUNT(*) FROM information_schema.processlist WHERE user = %s", link.lab.database.user
    )
    assert connections[0][0] < 20
    assert not any(one.done() for one in waiting)


def test_stock_of_a_peer_that_is_handed_out_here_waits_here_no_more(link: StubLink) -> None:
    load = replace(sealed_keys(link.carol, link.alice, link.lab.places[0], count=3), stock=True)
    link.bring(load)
    wait_for(lambda: link.status()["stock"]["held"] == 3, timeout_seconds=10)
    assert link.retrieving(load.records[0][0]).result(10).status == 200
    wait_for(lambda: link.status()["stock"]["held"] == 2, timeout_seconds=10)


# --- who may ask


def test_a_caller_without_a_proven_name_gets_nothing_with_a_peer_that_has_a_list(new_link: NewLink) -> None:
    link = new_link(stock=4, allow=["router-*"])
    for target in (f"/key?remoteSystemID={CAROL}", f"/key/{secrets.token_hex(16)}?remoteSystemID={CAROL}"):
        answer = ask(link.alice, target)
        assert answer.status == 400
        assert "may ask for" in answer.error
