"""Item 12: what two idle key providers cost, and what one syncer costs that has 200 peers."""

from __future__ import annotations

import time

from bench.cpu import CpuMeter
from bench.plan import Plan
from bench.report import Figure, Finding, Line, Target
from bench.simulated_peers import SimulatedPeers
from bench.sites_stage import SitesStage
from bench.stage import Stage
from sandbox.key_provider import ROLES, KeyProvider
from sandbox.mariadb import Database
from sandbox.processes import SandboxError, wait_until

_STOCK = 64
_PEERS = 200
_INTERVAL_SECONDS = 5.0
# Starting costs more than being there.
_CALM_SECONDS = 6
_HUB = "KP_Hub"
# Intervals are spread by a tenth, and one may lie across the end.
_LEAST_SHARE = 0.7


def measure(stage: Stage, plan: Plan) -> Finding:
    sites = stage.sites()
    sites.set_up(_STOCK)
    idle, shares = _idle(sites, plan)
    many, heartbeats = _many_peers(sites, plan)
    lines = [
        Line(
            12,
            Figure("six processes of two idle key providers", [idle], "% of a core"),
            target=Target("at most", 3, "%", idle),
        ),
        Line(
            12,
            Figure(f"a syncer with {_PEERS} peers, heartbeats every {_INTERVAL_SECONDS:g} s", [many], "% of a core"),
            target=Target("at most", 25, "%", many),
        ),
    ]
    return Finding(lines, [f"item 12: idle, {shares}", f"item 12: {heartbeats}"])


def _idle(sites: SitesStage, plan: Plan) -> tuple[float, str]:
    pids = {f"{role} {kp.system_id}": kp.processes[role].pid for kp in (sites.alice, sites.bob) for role in ROLES}
    sites.settle()
    time.sleep(_CALM_SECONDS)
    with CpuMeter(**pids) as meter:
        time.sleep(plan.idle_seconds)
    shares = {name: 100 * meter.cores(name) for name in pids}
    return sum(shares.values()), ", ".join(f"{name} {share:.2f} %" for name, share in shares.items())


def _many_peers(sites: SitesStage, plan: Plan) -> tuple[float, str]:
    """A third key provider at the first site. Its janitor runs too: who is not announced sends no heartbeats."""
    server, broker = sites.sites.mysql_servers[0], sites.sites.rabbitmq_servers[0]
    database = server.create_database("bench_hub", user="bench_hub")
    simulated = SimulatedPeers(broker.url, _HUB, _PEERS, _INTERVAL_SECONDS)
    ids = [peer.id for peer in simulated.all]
    hub = KeyProvider(_HUB, ids, database, broker.url, root=sites.sites.logs.parent / "hub")
    try:
        hub.make_files()
        hub.link_by_bus(*(peer.peer() for peer in simulated.all))
        for role in ("janitor", "syncer"):
            hub.start(role)
        # Its queue must be there before anybody is sent an announcement.
        wait_until(lambda: "broker connected" in hub.log_of("syncer").read_text(), f"{_HUB}'s syncer to be connected")
        with simulated:
            wait_until(lambda: _told(database) == (_PEERS, _PEERS), f"{_HUB} to hear its {_PEERS} peers")
            time.sleep(_CALM_SECONDS)
            sent, received = simulated.sent, simulated.received
            with CpuMeter(syncer=hub.processes["syncer"].pid) as meter:
                time.sleep(plan.idle_seconds)
            came, went = simulated.sent - sent, simulated.received - received
            still = _told(database)
        if still != (_PEERS, _PEERS) or min(came, went) < _LEAST_SHARE * _PEERS * plan.idle_seconds / _INTERVAL_SECONDS:
            raise SandboxError(f"{came} heartbeats came to the syncer and {went} went out; {still} peers were known")
    finally:
        hub.stop_all()
        server.drop_database(database)
    summary = f"in {plan.idle_seconds} s {came} heartbeats came to the syncer and {went} envelopes from it"
    return 100 * meter.cores("syncer"), summary


def _told(database: Database) -> tuple[int, int]:
    """How many peers were heard within the last two intervals, and of how many there is an announcement."""
    since_ms = int((time.time() - 2 * _INTERVAL_SECONDS) * 1000)
    with database.connect() as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT (SELECT COUNT(*) FROM peers WHERE last_heartbeat_ms > %s), COUNT(*) FROM bus_announcements",
            (since_ms,),
        )
        row = cursor.fetchone()
    return (int(row[0]), int(row[1])) if row else (0, 0)
