"""Key providers with a store each: how they are introduced and started, and what they report of each other."""

from __future__ import annotations

from collections.abc import Sequence

from sandbox.client import metric
from sandbox.key_provider import BusPeer, KeyProvider, stock_of
from sandbox.ports import free_port
from sandbox.simulated_peer import SealedKeys, SimulatedPeer, seal_keys
from skipbus.shared.clock import now_ms
from skipbus.shared.crypto.epochs import PublicEpoch, current_epoch
from skipbus.shared.protocol.announcements import read_announcement
from skipbus_testkit.client import Answer, Client
from tests.system.harness import Lab, Place, rows
from tests.waiting import wait_for

HEALED_SECONDS = 30.0
# Stock is counted once a second.
COUNTED_SECONDS = 1.2


def introduce_all(
    *kps: KeyProvider,
    peers: Sequence[SimulatedPeer] = (),
    stock: int = 0,
    peers_stock: int = 0,
    by_https: bool = False,
) -> None:
    """Write every one of them, and the simulated peers, into the configuration of all others; keyrings are made."""
    for kp in kps:
        if by_https:
            kp.serve_tls(free_port())
            # Key providers show each other no certificates of clients: it is the envelopes that are signed.
            del kp.environ["SKIP_TLS_CLIENT_CA_FILE"]
        kp.make_files()
    for kp in kps:
        others = [
            BusPeer(
                other.system_id,
                other.identity,
                stock,
                other.tls.url if by_https and other.tls else None,
                other.tls.ca_file if by_https and other.tls else None,
            )
            for other in kps
            if other is not kp
        ]
        kp.link_by_bus(*others, *(peer.peer(peers_stock) for peer in peers))


def start_all(*kps: KeyProvider) -> None:
    """Started at the same time, healthy, their syncers' metrics within reach."""
    for kp in kps:
        kp.environ_of["syncer"] = {"SKIP_METRICS_PORT": str(free_port())}
        kp.start_all()
    for kp in kps:
        kp.wait_healthy(60)


def wait_linked(lab: Lab, *kps: KeyProvider) -> None:
    """Until each can have a key placed at every other."""
    for source in kps:
        for target in kps:
            if source is not target:
                lab.wait_announced(source, target.system_id)


def epoch_of(kp: KeyProvider, place: Place) -> PublicEpoch:
    """The one to seal to now."""
    epoch = current_epoch(epochs_of(kp, place), now_ms())
    assert epoch is not None, f"{kp.system_id} has announced no epoch"
    return epoch


def epochs_of(kp: KeyProvider, place: Place) -> Sequence[PublicEpoch]:
    found = rows(place.database, "SELECT body FROM announcements WHERE system_id = %s", kp.system_id)
    return read_announcement(found[0][0]).epochs if found else ()


def sealed_keys(
    source: SimulatedPeer, target: KeyProvider, place: Place, count: int = 1, *, source_id: str | None = None
) -> SealedKeys:
    """Fresh keys of a simulated peer, sealed to the epoch that ``target`` has announced in its own store."""
    epoch = epoch_of(target, place)
    return seal_keys(source.identity, source_id or source.id, target.system_id, epoch, count)


def syncer_metric(kp: KeyProvider, name: str, **labels: str) -> float:
    """The sum of a counter of the syncer over all series that have these labels."""
    return sum(metric(kp.environ_of["syncer"]["SKIP_METRICS_PORT"], name, **labels))


def rejected(kp: KeyProvider, reason: str, sender: str | None = None) -> float:
    """How many envelopes a key provider's syncer has refused for a reason, of that sender if one is named."""
    labels = {"reason": reason} | ({"sender": sender} if sender is not None else {})
    return syncer_metric(kp, "skipbus_envelopes_refused_total", **labels)


def wait_stock(kp: KeyProvider, peer_id: str, placed: int, timeout_seconds: float = HEALED_SECONDS) -> None:
    """Until that many keys of stock are placed at the peer."""
    wait_for(lambda: stock_of(kp, peer_id)["placed"] >= placed, timeout_seconds=timeout_seconds)


def wait_logged(kp: KeyProvider, text: str, role: str = "syncer", timeout_seconds: float = 15) -> None:
    """Until a process's log holds a text."""
    wait_for(lambda: text in kp.log_of(role).read_text(), timeout_seconds=timeout_seconds)


def post_sync(kp: KeyProvider, body: bytes) -> Answer:
    """`POST /sync`."""
    return Client(kp.url, timeout_seconds=30).request("POST", "/sync", body)
