"""What key providers tell each other over the bus, as `/status/sync`, `/health` and the logs show it."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from typing import Any

import pytest

from sandbox.client import Key, get
from sandbox.key_provider import KeyProvider
from sandbox.rabbitmq import RabbitMqServer
from tests.system.harness import ALICE, BOB, Lab, ask, log_lines
from tests.waiting import wait_for

HEARTBEAT_SECONDS = 1
TOLD_SECONDS = 20.0


@pytest.fixture(scope="module")
def pair(shared_lab: Lab) -> tuple[KeyProvider, KeyProvider]:
    return shared_lab.add_pair(SKIP_HEARTBEAT_SECONDS=str(HEARTBEAT_SECONDS))


def peer(kp: KeyProvider, peer_id: str) -> dict[str, Any]:
    found = get(kp.url, "status", "sync").body["peers"][peer_id]
    assert isinstance(found, dict)
    return found


def counts(kp: KeyProvider, peer_id: str) -> dict[str, int]:
    """The four numbers of the keys that `kp` issued for the peer."""
    return {name: peer(kp, peer_id)[name] for name in ("issued", "waiting", "retrieved", "expired")}


def wait_status(kp: KeyProvider, peer_id: str, status: str, timeout_seconds: float = TOLD_SECONDS) -> None:
    wait_for(lambda: peer(kp, peer_id)["status"] == status, timeout_seconds=timeout_seconds)


class Ledger:
    """What the counters of a lab must come to: all that was handed out, and what became of it."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._retrieved: Counter[str] = Counter()
        self._expired: Counter[str] = Counter()

    def exchange(self, source: KeyProvider, target_id: str, issued: int, retrieved: int) -> None:
        keys = [self._lab.issue(source, target_id) for _ in range(issued)]
        for key in keys[:retrieved]:
            self._lab.assert_retrievable(key)
        self._retrieved[source.system_id] += retrieved

    def everything_else_expires(self) -> None:
        for name, issued in self._issued().items():
            self._expired[name] = issued - self._retrieved[name]

    def wait_until_told(self, *kps: KeyProvider) -> None:
        """Both ends count the same, and nothing is counted twice."""
        ways = [(source, target) for source in kps for target in kps if source is not target or len(kps) == 1]
        for source, target in ways:
            wanted = self._wanted(source.system_id)
            wait_for(lambda s=source, t=target, w=wanted: counts(s, t.system_id) == w, timeout_seconds=TOLD_SECONDS)  # type: ignore[misc]
            wait_for(
                lambda s=source, t=target, w=wanted: peer(t, s.system_id)["inbound"] == w | {"withdrawn": 0},  # type: ignore[misc]
                timeout_seconds=TOLD_SECONDS,
            )

    def _issued(self) -> Counter[str]:
        return Counter(key.source for key in self._lab.handed_out)

    def _wanted(self, name: str) -> dict[str, int]:
        issued, retrieved, expired = self._issued()[name], self._retrieved[name], self._expired[name]
        waiting = issued - retrieved - expired
        return {"issued": issued, "waiting": waiting, "retrieved": retrieved, "expired": expired}


# --- counters


def test_both_ends_count_what_was_issued_waits_was_retrieved_and_has_expired(lab: Lab) -> None:
    alice, bob = lab.add_pair(
        SKIP_HEARTBEAT_SECONDS=str(HEARTBEAT_SECONDS), SKIP_KEY_TTL_SECONDS="8", SKIP_EPOCH_SECONDS="60"
    )
    ledger = Ledger(lab)
    ledger.exchange(alice, BOB, issued=7, retrieved=4)
    ledger.exchange(bob, ALICE, issued=5, retrieved=2)
    ledger.everything_else_expires()
    ledger.wait_until_told(alice, bob)


@pytest.mark.stops_servers
def test_counters_are_exact_after_kills_of_the_syncers_and_of_the_broker(lab: Lab, rabbitmq: RabbitMqServer) -> None:
    alice, bob = lab.add_pair(SKIP_HEARTBEAT_SECONDS=str(HEARTBEAT_SECONDS))
    ledger = Ledger(lab)
    for victim in (alice, bob, alice, bob):
        ledger.exchange(alice, BOB, issued=3, retrieved=1)
        ledger.exchange(bob, ALICE, issued=3, retrieved=2)
        # At different moments of the way of what was just written.
        time.sleep(0.3)
        victim.kill("syncer")
        victim.start("syncer")
    rabbitmq.kill()
    ledger.exchange(alice, BOB, issued=3, retrieved=3)
    rabbitmq.start()
    ledger.exchange(bob, ALICE, issued=3, retrieved=3)
    ledger.wait_until_told(alice, bob)


def test_a_lab_with_one_key_provider_serves_both_encryptors_and_is_its_own_peer(lab: Lab) -> None:
    kp = lab.add("KP_Lab", "KP_Lab", env={"SKIP_HEARTBEAT_SECONDS": str(HEARTBEAT_SECONDS)})
    kp.start_all()
    kp.wait_healthy(60)
    lab.wait_announced(kp, "KP_Lab")
    wait_status(kp, "KP_Lab", "online")
    ledger = Ledger(lab)
    ledger.exchange(kp, "KP_Lab", issued=4, retrieved=3)
    assert lab.retrieve(kp, lab.handed_out[-2]).status == 400, "it was handed out twice"
    ledger.wait_until_told(kp)


# --- liveness


def test_a_peer_goes_from_online_to_late_to_offline_and_back_and_counts_what_it_missed_once(
    shared_lab: Lab, pair: tuple[KeyProvider, KeyProvider]
) -> None:
    alice, bob = pair
    wait_status(alice, BOB, "online")
    ledger = Ledger(shared_lab)
    ledger.wait_until_told(alice, bob)
    before = len(log_lines(alice, "syncer"))
    syncer = bob.processes["syncer"].pid
    heard = []
    os.kill(syncer, signal.SIGSTOP)
    try:
        for status in ("late", "offline"):
            wait_status(alice, BOB, status)
            heard.append(peer(alice, BOB)["last_heartbeat"])
        assert heard[0] == heard[1], "a stopped process was heard"
        assert time.time() - heard[1] > 5 * HEARTBEAT_SECONDS
        wait_for(lambda: changes(alice, before)[-2:] == ["peer late", "peer offline"], timeout_seconds=TOLD_SECONDS)
        # Over a shared store the keys do not need the bus.
        ledger.exchange(alice, BOB, issued=3, retrieved=0)
    finally:
        os.kill(syncer, signal.SIGCONT)
    wait_status(alice, BOB, "online")
    assert peer(alice, BOB)["last_heartbeat"] > heard[1]
    wait_for(lambda: changes(alice, before)[-1] == "peer online", timeout_seconds=TOLD_SECONDS)
    ledger.wait_until_told(alice, bob)


def changes(kp: KeyProvider, first_line: int) -> list[str]:
    """The changes of its peers' status that a syncer has logged since."""
    events = [line["event"] for line in log_lines(kp, "syncer")[first_line:]]
    return [event for event in events if event in ("peer online", "peer late", "peer offline")]


# --- health


def test_health_names_a_process_that_is_away_and_stays_200(pair: tuple[KeyProvider, KeyProvider]) -> None:
    alice, _ = pair
    wait_for(lambda: get(alice.url, "health").body["status"] == "ok", timeout_seconds=TOLD_SECONDS)
    for role in ("syncer", "janitor"):
        alice.kill(role)
        wait_for(lambda role=role: get(alice.url, "health").body[role] != "ok", timeout_seconds=TOLD_SECONDS)  # type: ignore[misc]
        answer = get(alice.url, "health")
        assert (answer.status, answer.body["status"]) == (200, "degraded")
        alice.start(role)
        wait_for(lambda: get(alice.url, "health").body["status"] == "ok", timeout_seconds=TOLD_SECONDS)


# --- one correlation id all the way


def test_one_correlation_id_goes_through_api_bus_and_peer(
    shared_lab: Lab, pair: tuple[KeyProvider, KeyProvider]
) -> None:
    alice, bob = pair
    key = shared_lab.issue(alice, BOB)
    shared_lab.assert_retrievable(key)
    for kp in (alice, bob):
        wait_for(lambda kp=kp: len(lines_about(kp, key)) == 1, timeout_seconds=TOLD_SECONDS)  # type: ignore[misc]
    correlation_id = lines_about(alice, key)[0]["correlation_id"]
    assert lines_about(bob, key)[0]["issued_as"] == correlation_id
    for kp, event in ((alice, "events sent"), (bob, "events received")):
        wait_for(lambda kp=kp, event=event: tells(kp, event, correlation_id), timeout_seconds=TOLD_SECONDS)  # type: ignore[misc]


def lines_about(kp: KeyProvider, key: Key) -> list[dict[str, Any]]:
    """The access lines that name a key."""
    return [line for line in log_lines(kp, "api") if key.key_id[:12] in line.get("path", "")]


def tells(kp: KeyProvider, event: str, correlation_id: str) -> bool:
    lines = [line for line in log_lines(kp, "syncer") if line["event"] == event]
    return any(correlation_id in line["correlation_ids"] for line in lines)


def test_access_lines_have_what_an_operator_needs_and_no_whole_key_id(
    shared_lab: Lab, pair: tuple[KeyProvider, KeyProvider]
) -> None:
    alice, bob = pair
    key = shared_lab.issue(alice, BOB)
    shared_lab.assert_retrievable(key)
    ask(bob, f"/key/{key.key_id}?remoteSystemID={ALICE}")
    wait_for(lambda: len(lines_about(bob, key)) == 2, timeout_seconds=TOLD_SECONDS)
    lines = lines_about(bob, key)
    assert [line["status"] for line in lines] == [200, 400]
    needed = {"timestamp", "level", "event", "method", "path", "status", "duration_ms", "client", "correlation_id"}
    assert all(needed <= set(line) for line in lines)
    assert "reason" in lines[1]
    assert key.key_id not in bob.log_of("api").read_text()
