"""Facts about trust over bus links: whom a KP believes, by what, and what it tells its operator."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from sqlalchemy import event

from skipbus.ctl.__main__ import main
from skipbus.services.api.links.refill import StockMaker
from skipbus.services.api.links.sealing import Sealer, not_usable
from skipbus.services.syncer.apply import Applier
from skipbus.services.syncer.peers import PeerClocks
from skipbus.services.syncer.verify import Rejected, Verified, Verifier
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import EpochSpan, PublicEpoch, new_epoch_id
from skipbus.shared.crypto.hpke import HybridPrivateKey
from skipbus.shared.crypto.identity import Identity, fingerprint
from skipbus.shared.crypto.keyring import Keyring
from skipbus.shared.crypto.pins import PinBook
from skipbus.shared.errors import OperatorError, PeerNotReady
from skipbus.shared.peer_directory import PIN_REREAD_MS, PeerDirectory
from skipbus.shared.presented_identities import PRESENTED_EVERY_MS, PRESENTED_KEPT_MS
from skipbus.shared.protocol.announcements import Announcement, sign_announcement
from skipbus.shared.protocol.envelopes import EnvelopeType, Header, sign_envelope
from skipbus.shared.protocol.payloads import Capabilities, pack_capabilities, pack_heartbeat
from skipbus.shared.protocol.system_ids import RemoteSystemIds
from skipbus.shared.settings.peers import PeerSettings, identity_line
from skipbus.shared.store import outbox, peers
from skipbus.shared.store.announcements import upsert_announcement, upsert_bus_announcement
from skipbus.shared.store.peers import PeerLiveness, PeerRow, fetch_peer_rows
from skipbus.shared.store.pinned_identities import fetch_pin
from tests.integration.key_providers import Store

ALICE, BOB, CAROL = "KP_Alice", "KP_Bob", "KP_Carol"


@pytest.fixture(scope="module")
def bob() -> Identity:
    return Identity.generate()


@pytest.fixture(scope="module")
def thief() -> Identity:
    return Identity.generate()


def announcement(name: str, identity: Identity, issued_ms: int | None = None) -> tuple[Announcement, bytes]:
    at_ms = now_ms()
    span = EpochSpan(at_ms - 60_000, at_ms + 600_000, at_ms + 1_200_000)
    epoch = PublicEpoch(new_epoch_id(), span, HybridPrivateKey.generate().public_bytes())
    made = Announcement(name, identity.public_key, at_ms if issued_ms is None else issued_ms, "test", (epoch,))
    return made, sign_announcement(made, identity)


def announce_in_store(store: Store, name: str, identity: Identity) -> None:
    with store.engine.begin() as connection:
        upsert_announcement(connection, *announcement(name, identity))


def announce_over_bus(store: Store, name: str, identity: Identity, local_id: str = ALICE) -> None:
    with store.engine.begin() as connection:
        upsert_bus_announcement(connection, local_id, *announcement(name, identity))


def directory_of(store: Store, *peers: PeerSettings, local_id: str = ALICE) -> PeerDirectory:
    remote_ids = RemoteSystemIds(["KP_*"], local_id)
    pins = PinBook(store.folder / f"pins-{local_id}")
    made = PeerDirectory(store.engine, local_id, remote_ids, pins, {peer.system_id: peer for peer in peers})
    made.refresh(now_ms())
    return made


def over_bus(identity: Identity) -> PeerSettings:
    return PeerSettings(BOB, "bus", identity.public_key)


def envelope(
    kind: EnvelopeType, payload: bytes, identity: Identity, *, number: int = 1, age_ms: int = 0, sender: str = BOB
) -> bytes:
    return sign_envelope(Header(kind, sender, ALICE, number, now_ms() - age_ms), payload, identity)


def heartbeat(identity: Identity, *, number: int = 1, age_ms: int = 0) -> bytes:
    return envelope(EnvelopeType.HEARTBEAT, pack_heartbeat(5000, None, "test"), identity, number=number, age_ms=age_ms)


def capabilities(identity: Identity, announced_by: Identity | None = None) -> bytes:
    _, body = announcement(BOB, announced_by or identity)
    return envelope(EnvelopeType.CAPABILITIES, pack_capabilities(body, request=False), identity)


def accepted(store: Store, directory: PeerDirectory, body: bytes) -> Verified:
    verdict = Verifier(ALICE, directory, frozenset).verify(body, redelivered=False, waited_ms=0)
    assert isinstance(verdict, Verified), verdict
    return verdict


def refused(store: Store, directory: PeerDirectory, body: bytes) -> Rejected:
    verdict = Verifier(ALICE, directory, frozenset).verify(body, redelivered=False, waited_ms=0)
    assert isinstance(verdict, Rejected), verdict
    return verdict


def apply(store: Store, one: Verified, *bus_ids: str) -> None:
    Applier(store.engine, ALICE, bus_ids).apply([one], now_ms(), again=False)


def announcing(identity: Identity, issued_ms: int) -> Verified:
    made, body = announcement(BOB, identity, issued_ms)
    header = Header(EnvelopeType.CAPABILITIES, BOB, ALICE, 1, now_ms())
    return Verified(header, Capabilities(body, request=False), redelivered=False, announcement=made)


def row_of_bob(store: Store) -> PeerRow:
    with store.engine.connect() as connection:
        (row,) = [row for row in fetch_peer_rows(connection, ALICE) if row.peer_id == BOB]
    return row


# Whom a KP believes

# What is said of KP_Bob where no key can be sealed to it: an operator follows the advice.
UNKNOWN_IN_STORE = "has not announced itself: no key can be sealed to it until it has started once over this store"
UNKNOWN_ON_BUS = "no announcement of key provider KP_Bob has come over the bus yet"
PINNED = r"another identity than the pinned one: .* \(skipctl identity accept\)"
CONFIGURED = r"another identity than the one that is configured for it: .* \[\[peers\]\] is corrected"


def test_where_no_key_can_be_sealed_to_a_peer_the_advice_fits_its_link(
    store: Store, bob: Identity, thief: Identity
) -> None:
    in_store, on_bus = directory_of(store), directory_of(store, over_bus(bob))
    configured = directory_of(store, PeerSettings(BOB, "store", bob.public_key))
    assert re.search(UNKNOWN_IN_STORE, str(not_usable(in_store, BOB)))
    assert re.search(UNKNOWN_IN_STORE, str(not_usable(configured, BOB)))
    assert re.search(UNKNOWN_ON_BUS, str(not_usable(on_bus, BOB)))
    announce_in_store(store, BOB, bob)
    in_store.refresh(now_ms())
    announce_in_store(store, BOB, thief)
    on_bus.note_presented(BOB, thief.public_key, now_ms())
    for directory in (in_store, on_bus, configured):
        directory.refresh(now_ms())
    assert re.search(PINNED, str(not_usable(in_store, BOB)))
    assert re.search(CONFIGURED, str(not_usable(configured, BOB)))
    assert re.search(CONFIGURED, str(not_usable(on_bus, BOB)))


def test_stock_that_cannot_be_made_for_a_bus_peer_is_not_blamed_on_the_store(store: Store, bob: Identity) -> None:
    directory = directory_of(store, over_bus(bob))
    maker = StockMaker(store.engine, 3600, Sealer(ALICE, Identity.generate(), directory))
    with pytest.raises(PeerNotReady, match=UNKNOWN_ON_BUS):
        maker.make(BOB, 1)


def test_a_bus_peer_is_believed_by_its_configured_identity_before_it_has_announced_anything(
    store: Store, bob: Identity
) -> None:
    directory = directory_of(store, over_bus(bob))
    assert (directory.pin(BOB), directory.get(BOB)) == (bob.public_key, None)
    assert directory.peers() == [BOB]
    assert accepted(store, directory, heartbeat(bob)).header.sender == BOB


def test_what_a_bus_peer_announces_is_seen_by_the_kp_that_it_told_and_by_no_other_of_the_store(
    store: Store, bob: Identity
) -> None:
    directory = directory_of(store, over_bus(bob))
    apply(store, accepted(store, directory, capabilities(bob)), BOB)
    directory.refresh(now_ms())
    announced = directory.get(BOB)
    assert announced is not None
    assert announced.public_key == bob.public_key
    assert store.count("announcements") == 0
    for other in (directory_of(store, local_id=CAROL), directory_of(store, over_bus(bob), local_id=CAROL)):
        assert other.get(BOB) is None


def test_what_stands_in_the_store_under_a_bus_peers_name_is_not_looked_at(
    store: Store, bob: Identity, thief: Identity
) -> None:
    announce_in_store(store, BOB, thief)
    directory = directory_of(store, over_bus(bob))
    assert (directory.get(BOB), directory.pin(BOB), directory.conflicts()) == (None, bob.public_key, {})
    announce_in_store(store, BOB, bob)
    directory.refresh(now_ms())
    assert directory.get(BOB) is None


def test_the_identity_of_a_bus_peer_is_never_learned(store: Store, bob: Identity, tmp_path: Path) -> None:
    keyring = Keyring.create(tmp_path / "k", ALICE)
    announce_over_bus(store, BOB, bob)
    remote_ids = RemoteSystemIds([BOB], ALICE)
    directory = PeerDirectory(store.engine, ALICE, remote_ids, keyring.pins, {BOB: over_bus(bob)})
    directory.refresh(now_ms())
    assert directory.get(BOB) is not None
    assert keyring.pins.get(BOB) is None
    assert store.count("pinned_identities") == 0


def test_a_store_peer_with_a_configured_identity_is_believed_by_that_and_by_no_pin(
    store: Store, bob: Identity, thief: Identity, capsys: pytest.CaptureFixture[str]
) -> None:
    announce_in_store(store, BOB, thief)
    directory_of(store)  # learns the thief's
    directory = directory_of(store, PeerSettings(BOB, identity=bob.public_key))
    assert (directory.get(BOB), directory.pin(BOB)) == (None, bob.public_key)
    assert directory.conflicts()[BOB].presented_key == thief.public_key
    lines = capsys.readouterr().out
    assert "identity differs from the configured one" in lines
    assert fingerprint(bob.public_key) in lines
    assert fingerprint(thief.public_key) in lines
    store.rows("DELETE FROM announcements")
    announce_in_store(store, BOB, bob)
    directory.refresh(now_ms())
    assert directory.get(BOB) is not None
    assert directory.conflicts() == {}


def test_an_older_announcement_does_not_replace_a_newer_one_and_one_of_another_identity_gives_way(
    store: Store, bob: Identity, thief: Identity
) -> None:
    directory, latest_ms = directory_of(store, over_bus(bob)), now_ms()
    for issued_ms in (latest_ms, latest_ms - 5000):
        apply(store, announcing(bob, issued_ms), BOB)
        directory.refresh(now_ms())
        kept = directory.get(BOB)
        assert kept is not None
        assert kept.issued_ms == latest_ms
    # The operator has corrected the configuration: the old identity's announcement is in nobody's way.
    with store.engine.begin() as connection:
        upsert_bus_announcement(connection, ALICE, *announcement(BOB, thief, now_ms() + 10**9))
    directory.refresh(now_ms())
    assert (directory.get(BOB), directory.conflicts()) == (None, {})
    apply(store, announcing(bob, latest_ms), BOB)
    directory.refresh(now_ms())
    assert directory.get(BOB) is not None


def test_stock_that_was_sealed_to_another_identity_is_dropped_when_the_new_one_announces_itself(
    store: Store, bob: Identity, thief: Identity
) -> None:
    for peer_id, key_id in ((BOB, b"bobs"), ("KP_Carol", b"carols")):
        values = (ALICE, peer_id, now_ms() + 60_000, key_id, 256, b"w", b"n", b"s", key_id, 1)
        store.rows(f"INSERT INTO stock VALUES ({', '.join(['%s'] * 10)})", *values)
        with store.engine.begin() as connection:
            outbox.insert_outbox_rows(connection, [outbox.OutboxRow(ALICE, peer_id, "key.stocked", b"\x90", 0, 1)])
    announce_over_bus(store, BOB, thief)
    apply(store, announcing(bob, now_ms()), BOB)
    assert store.rows("SELECT key_id FROM stock") == [(b"carols",)]
    assert store.rows("SELECT peer_id FROM outbox") == [("KP_Carol",)]


# Another identity


def test_another_identity_presented_over_the_bus_is_refused_and_told_with_both_fingerprints(
    store: Store, bob: Identity, thief: Identity, capsys: pytest.CaptureFixture[str]
) -> None:
    announce_over_bus(store, BOB, bob)
    directory, beside = directory_of(store, over_bus(bob)), directory_of(store, over_bus(bob))
    verdict = refused(store, directory, capabilities(thief))
    assert (verdict.reason, verdict.verified) == ("identity_changed", False)
    directory.refresh(now_ms())
    assert directory.conflicts()[BOB].presented_key == thief.public_key
    lines = capsys.readouterr().out
    assert lines.count("identity differs from the configured one") == 1
    assert fingerprint(bob.public_key) in lines
    assert fingerprint(thief.public_key) in lines
    # Whatever else it signs is refused under that name, and the peer itself is none the worse.
    assert refused(store, directory, heartbeat(thief)).reason == "identity_changed"
    assert accepted(store, directory, heartbeat(bob)).header.sender == BOB
    assert directory.get(BOB) is not None
    # Other processes of this KP see it in the store.
    beside.refresh(now_ms() + 10_000)
    assert beside.conflicts()[BOB].presented_key == thief.public_key


def test_a_presented_identity_is_forgotten_when_it_is_presented_no_more(
    store: Store, bob: Identity, thief: Identity
) -> None:
    directory = directory_of(store, over_bus(bob))
    refused(store, directory, capabilities(thief))
    directory.refresh(now_ms())
    assert BOB in directory.conflicts()
    directory.refresh(now_ms() + PRESENTED_KEPT_MS + 1000)
    assert directory.conflicts() == {}


def test_whoever_presents_a_new_identity_each_time_is_noted_once_a_minute(
    store: Store, bob: Identity, thief: Identity
) -> None:
    directory, at_ms = directory_of(store, over_bus(bob)), now_ms()
    directory.note_presented(BOB, thief.public_key, at_ms)
    directory.note_presented(BOB, b"x" * 2592, at_ms + PRESENTED_EVERY_MS - 1)
    directory.refresh(at_ms)
    assert directory.conflicts()[BOB].presented_key == thief.public_key
    directory.note_presented(BOB, b"x" * 2592, at_ms + PRESENTED_EVERY_MS)
    directory.refresh(at_ms + PRESENTED_EVERY_MS)
    assert directory.conflicts()[BOB].presented_key == b"x" * 2592


@pytest.mark.parametrize("sender", [BOB, CAROL])
def test_an_unsigned_claim_to_an_identity_presents_nothing(
    store: Store, bob: Identity, thief: Identity, sender: str
) -> None:
    _, stolen = announcement(sender, bob)
    directory = directory_of(store, over_bus(Identity.generate()), PeerSettings(CAROL))
    body = envelope(EnvelopeType.CAPABILITIES, pack_capabilities(stolen, request=False), thief, sender=sender)
    assert refused(store, directory, body).reason in ("bad_signature", "unknown_sender")
    directory.refresh(now_ms())
    assert directory.conflicts() == {}


def test_a_peer_that_announces_another_identity_than_it_signs_with_is_refused(
    store: Store, bob: Identity, thief: Identity
) -> None:
    directory = directory_of(store, over_bus(bob))
    assert refused(store, directory, capabilities(bob, announced_by=thief)).reason == "identity_changed"


# Clocks


def record(store: Store, clocks: PeerClocks) -> None:
    with store.engine.begin() as connection:
        clocks.record(connection)


@pytest.mark.parametrize("age_ms", [-29_000, 0, 29_000])
def test_a_heartbeat_shows_how_far_the_clocks_are_apart(store: Store, bob: Identity, age_ms: int) -> None:
    apply(store, accepted(store, directory_of(store, over_bus(bob)), heartbeat(bob, age_ms=age_ms)), BOB)
    row = row_of_bob(store)
    assert row.last_heartbeat_ms is not None
    assert abs((row.clock_skew_ms or 0) - age_ms) < 1000


def test_a_heartbeat_that_its_date_has_refused_shows_it_too(store: Store, bob: Identity) -> None:
    directory, clocks = directory_of(store, over_bus(bob)), PeerClocks(ALICE)
    for age_ms in (-90_000, 7_200_000, -(10**12)):
        verdict = refused(store, directory, heartbeat(bob, age_ms=age_ms))
        assert verdict.verified
        assert verdict.clock_skew_ms is not None
        clocks.note(BOB, 5, verdict.clock_skew_ms)
        record(store, clocks)
        row = row_of_bob(store)
        assert row.last_heartbeat_ms is None
        assert abs((row.clock_skew_ms or 0) - max(-(2**31), age_ms)) < 1000


def test_a_heartbeat_of_a_clock_minutes_behind_is_no_sign_of_life_but_shows_the_clock(
    store: Store, bob: Identity
) -> None:
    directory = directory_of(store, over_bus(bob))
    apply(store, accepted(store, directory, heartbeat(bob, number=5, age_ms=300_000)), BOB)
    row = row_of_bob(store)
    assert (row.last_heartbeat_ms, round((row.clock_skew_ms or 0) / 1000)) == (None, 300)


def test_a_recorded_heartbeat_says_nothing_of_the_clock(store: Store, bob: Identity) -> None:
    directory, clocks = directory_of(store, over_bus(bob)), PeerClocks(ALICE)
    apply(store, accepted(store, directory, heartbeat(bob, number=7)), BOB)
    clocks.note(BOB, 7, 7_200_000)
    record(store, clocks)
    assert abs(row_of_bob(store).clock_skew_ms or 0) < 1000


@pytest.mark.parametrize(
    ("identity_is_right", "kind", "age_ms"),
    [(False, EnvelopeType.HEARTBEAT, -90_000), (True, EnvelopeType.KEY_STORED, 7_200_000)],
    ids=["a thief's", "one that was kept and had to wait"],
)
def test_what_says_nothing_of_the_clock_is_not_taken_for_it(
    store: Store, bob: Identity, thief: Identity, identity_is_right: bool, kind: EnvelopeType, age_ms: int
) -> None:
    body = envelope(kind, b"\x90", bob if identity_is_right else thief, age_ms=age_ms)
    assert refused(store, directory_of(store, over_bus(bob)), body).clock_skew_ms is None


def test_clocks_that_differ_by_too_much_are_told_by_name_and_amount_once(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    clocks = PeerClocks(ALICE)
    rows = [PeerLiveness(BOB, None, 0, -95_000), PeerLiveness(CAROL, None, 0, 30_000)]
    for _ in range(3):
        clocks.report(rows)
    lines = capsys.readouterr().out
    assert lines.count("clocks differ by too much") == 1
    assert BOB in lines
    assert "95.0 s ahead of the local one" in lines


# What the operator reads


class Endpoint(BaseHTTPRequestHandler):
    """Answers as an api would, or as somebody else."""

    body = b""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/base/capabilities" else 404)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/base"
    server.shutdown()
    thread.join()
    server.server_close()


class Operator:
    """Runs skipctl for KP_Alice."""

    def __init__(self, store: Store, folder: Path, toml: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.keyring = Keyring.create(folder / "alice", ALICE)
        file = folder / "alice.toml"
        file.write_text(toml)
        mysql = store.settings.mysql
        self.environ = {
            "SKIP_LOCAL_SYSTEM_ID": ALICE,
            "SKIP_KEYRING_DIR": str(folder / "alice"),
            "SKIP_CONFIG_FILE": str(file),
            "MYSQL_HOST": mysql.host,
            "MYSQL_PORT": str(mysql.port),
            "MYSQL_USER": mysql.user,
            "MYSQL_PASSWORD": mysql.password.reveal(),
            "MYSQL_DATABASE": mysql.database,
        }
        self._capsys = capsys

    def run(self, *arguments: str) -> tuple[int, str]:
        self._capsys.readouterr()
        code = main(list(arguments), self.environ)
        done = self._capsys.readouterr()
        return code, done.out + done.err


def table(identity: Identity, *lines: str) -> str:
    head = f'[[peers]]\nsystem_id = "{BOB}"\nlink = "bus"\nidentity = "{identity_line(identity.public_key)}"\n'
    return head + "".join(f"{line}\n" for line in lines)


def live(store: Store) -> None:
    at_ms = now_ms()
    for role in ("syncer", "janitor"):
        store.rows("INSERT INTO processes VALUES (%s, %s, 'h', %s, 'ok')", ALICE, role, at_ms)
    with store.engine.begin() as connection:
        peers.upsert_heartbeats(connection, ALICE, [peers.ReceivedHeartbeat(BOB, 1, 60_000)], at_ms)


def test_peer_check_says_all_that_is_wrong_and_when_nothing_is(
    store: Store, tmp_path: Path, bob: Identity, endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    operator = Operator(store, tmp_path, table(bob, "stock = 4", f'endpoint = "{endpoint}"'), capsys)
    Endpoint.body = b'{"localSystemID": "KP_Carol"}'
    code, words = operator.run("peer", "check")
    assert code == 1
    for sentence in (
        "Its syncer is not running.",
        "No announcement of it has come over the bus yet",
        "It has never been heard",
        "There is no usable stock (target 4)",
        "'KP_Carol' answers there",
    ):
        assert sentence in words
    live(store)
    announce_over_bus(store, BOB, bob)
    store.rows(
        "INSERT INTO stock SELECT %s, %s, %s, UNHEX(CONCAT('0', seq)), 256, 'w', 'n', 's', 't', 1 "
        "FROM (SELECT 1 AS seq UNION SELECT 2 UNION SELECT 3 UNION SELECT 4) AS numbers",
        ALICE,
        BOB,
        now_ms() + 3_600_000,
    )
    Endpoint.body = b'{"localSystemID": "KP_Bob"}'
    # A second syncer that stands by is no fault.
    store.rows("INSERT INTO processes VALUES (%s, 'syncer', 'z', %s, 'standby')", ALICE, now_ms() + 1)
    assert operator.run("peer", "check", BOB) == (0, f"{ALICE} (this key provider): ok\n{BOB}: ok\n")
    assert operator.run("peer", "list") == (0, f"{BOB}  bus  online  stock 4/4  ok\n")


def test_peer_check_tells_of_an_endpoint_that_is_no_key_provider_or_nobody(
    store: Store, tmp_path: Path, bob: Identity, endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    operator = Operator(store, tmp_path, table(bob, f'endpoint = "{endpoint}"'), capsys)
    file = tmp_path / "alice.toml"
    Endpoint.body = b"<html>"
    assert f"{endpoint}: what answers there is no key provider." in operator.run("peer", "check")[1]
    file.write_text(table(bob, f'endpoint = "{endpoint}/other"'))
    assert "it answers 404 to GET /capabilities" in operator.run("peer", "check")[1]
    file.write_text(table(bob, f'endpoint = "{endpoint.replace("http:", "https:")}"'))
    assert "TLS fails" in operator.run("peer", "check")[1]
    file.write_text(table(bob, 'endpoint = "http://127.0.0.1:9"'))
    assert "it cannot be reached (Connection refused)" in operator.run("peer", "check")[1]


def test_peer_check_tells_of_another_identity_and_of_whoever_is_not_configured(
    store: Store, tmp_path: Path, bob: Identity, thief: Identity, capsys: pytest.CaptureFixture[str]
) -> None:
    operator = Operator(store, tmp_path, table(bob), capsys)
    directory = directory_of(store, over_bus(bob))
    refused(store, directory, capabilities(thief))
    directory.refresh(now_ms())
    words = operator.run("peer", "check", BOB)[1]
    assert f"presents another identity ({fingerprint(thief.public_key)})" in words
    assert fingerprint(bob.public_key) in words
    code, words = operator.run("peer", "check", "KP_Nobody")
    assert code == 1
    assert "It is not configured" in words


def test_identity_show_begins_with_what_the_other_side_pastes(
    store: Store, tmp_path: Path, bob: Identity, thief: Identity, capsys: pytest.CaptureFixture[str]
) -> None:
    operator = Operator(store, tmp_path, table(bob), capsys)
    directory = directory_of(store, over_bus(bob))
    refused(store, directory, capabilities(thief))
    directory.refresh(now_ms())
    code, words = operator.run("identity", "show")
    assert code == 0
    own = operator.keyring.identity.public_key
    block = f'[[peers]]\nsystem_id = "{ALICE}"\nlink = "bus"\nidentity = "{identity_line(own)}"\n'
    assert words.partition("\n")[2].startswith(block)
    assert f"{BOB}  {fingerprint(bob.public_key)}  (configured)" in words
    assert f"presents another one, refused: {fingerprint(thief.public_key)}" in words


def test_a_configured_identity_is_not_changed_by_a_command(
    store: Store, tmp_path: Path, bob: Identity, thief: Identity, capsys: pytest.CaptureFixture[str]
) -> None:
    operator = Operator(store, tmp_path, table(bob), capsys)
    announce_in_store(store, BOB, thief)
    code, words = operator.run("identity", "accept", BOB)
    assert code == 1
    assert "is configured: change it in" in words
    with store.engine.connect() as connection:
        assert fetch_pin(connection, ALICE, BOB) is None
    assert issubclass(OperatorError, Exception)


@contextlib.contextmanager
def asked(store: Store, table: str) -> Iterator[list[str]]:
    """The statements that read rows of a table."""
    found: list[str] = []

    def note(_c: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("SELECT") and f"FROM {table}" in statement.replace("\n", "").replace("  ", " "):
            found.append(statement)

    event.listen(store.engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(store.engine, "before_cursor_execute", note)


def bodies_read(store: Store, directory: PeerDirectory) -> int:
    with asked(store, "announcements") as here, asked(store, "bus_announcements") as over_the_bus:
        directory.refresh(now_ms())
    return sum("body" in statement for statement in here + over_the_bus)


def pins_read(store: Store, directory: PeerDirectory, at_ms: int) -> bool:
    with asked(store, "pinned_identities") as found:
        directory.refresh(at_ms)
    return bool(found)


def test_a_directory_reads_every_announcement_that_matters_once_and_no_other(
    store: Store, bob: Identity, thief: Identity
) -> None:
    directory = directory_of(store, over_bus(bob))
    for announce, name in ((announce_over_bus, BOB), (announce_in_store, "KP_Carol")):
        announce(store, name, bob)
        assert bodies_read(store, directory) == 1
        assert directory.get(name) is not None
        assert bodies_read(store, directory) == 0
    announce_in_store(store, "Nobody", bob)
    announce_in_store(store, BOB, thief)
    announce_over_bus(store, "KP_Carol", thief)
    announce_over_bus(store, BOB, thief, local_id="KP_Carol")
    assert bodies_read(store, directory) == 0
    store.rows("DELETE FROM bus_announcements WHERE local_id = %s AND system_id = %s", ALICE, BOB)
    directory.refresh(now_ms())
    assert directory.get(BOB) is None


def test_a_directory_reads_pins_again_though_no_announcement_changes(
    store: Store, bob: Identity, thief: Identity
) -> None:
    announce_in_store(store, BOB, bob)
    directory, at_ms = directory_of(store), now_ms()
    directory.refresh(at_ms)
    assert not pins_read(store, directory, at_ms + 1_000)
    assert pins_read(store, directory, at_ms + PIN_REREAD_MS + 1_000)
    store.rows("DELETE FROM announcements")
    announce_in_store(store, BOB, thief)
    directory.refresh(at_ms + PIN_REREAD_MS + 2_000)
    # Until an operator has decided, each second.
    assert directory.conflicts()
    assert pins_read(store, directory, at_ms + PIN_REREAD_MS + 3_000)


def test_a_directory_reads_pins_again_where_another_identity_was_presented_over_the_bus(
    store: Store, bob: Identity, thief: Identity
) -> None:
    directory, at_ms = directory_of(store, over_bus(bob)), now_ms()
    directory.refresh(at_ms)
    directory.note_presented(BOB, thief.public_key, at_ms)
    assert pins_read(store, directory, at_ms + 1_000)
    assert directory.conflicts()
