"""`make demo`: two key providers over one store on private servers; with `TOPOLOGY=sites` at two sites, with
`TOPOLOGY=cluster` over a database cluster and a broker cluster of three nodes each.

Until Ctrl-C. It starts everything in a temporary folder, exchanges keys both ways, tells what it did, and then keeps
what dies alive and `.demo/state.json` true. It leaves nothing behind: no process, no folder; after a failure, the
logs only. `ONCE=1` ends it after the story, `PORT_BASE=n` fixes the ports. With two sites, `touch .demo/cut` cuts the
line between them until the file is removed. Exit codes: 0 as it should be, 1 something was not as it should be,
2 wrong usage, or another demo runs in this clone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from sandbox.cluster import ClusterTopology, remove_folder_of_cluster
from sandbox.key_provider import KeyProvider
from sandbox.processes import SandboxError, write_private
from sandbox.story import CutStory, Exchange, LostNodesStory
from sandbox.supervisor import Supervisor
from sandbox.topology import SharedStore, Topology
from sandbox.two_sites import TwoSites
from skipbus_testkit.client import request_target

CHECK_SECONDS = 0.1

_CLONE = Path(__file__).resolve().parent.parent
_DEMO_DIR = _CLONE / ".demo"
_FOLDER_PREFIX = "skipbus-demo-"
_TOPOLOGIES: Mapping[str, type[SharedStore | TwoSites]] = {"store": SharedStore, "sites": TwoSites}
_SERVERS = {
    "store": "MariaDB and RabbitMQ",
    "sites": "two MariaDB and two federated RabbitMQ",
    "cluster": "three MariaDB nodes with Galera and three RabbitMQ nodes",
}
_CUT_LINES = ["Cut the line between the sites, and heal it:", "", "  touch .demo/cut", "  rm .demo/cut", ""]


class UsageError(Exception):
    """The demo cannot be run like this (exit code 2)."""


class Stopped(BaseException):
    """Ctrl-C or SIGTERM. Not an Exception, so that no handler of errors swallows it."""


@dataclass(frozen=True)
class Wishes:
    """What the caller asked for by variables."""

    once: bool
    port_base: int | None
    topology: str


def main() -> int:
    try:
        wishes = _read_wishes(os.environ)
        with _only_demo_here(), _signals_stop():
            return _run(wishes)
    except UsageError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except Stopped:
        print("\nstopped; nothing is left behind", flush=True)
        return 0


def _run(wishes: Wishes) -> int:
    with _folder() as root:
        try:
            _play(root, wishes)
        except (SandboxError, OSError, ValueError) as error:
            print(f"\ndemo failed: {error}\n\nlogs are kept in {_keep_logs(root)}", file=sys.stderr)
            return 1
    return 0


def _play(root: Path, wishes: Wishes) -> None:
    site = _make(root, wishes)
    try:
        _say(f"starting {_SERVERS[wishes.topology]} …")
        site.start_servers()
        _say(f"starting KP_Alice and KP_Bob, {'six' if wishes.topology == 'cluster' else 'three'} processes each …\n")
        site.start_key_providers()
        _tell_story(site)
        if not wishes.once:
            _keep_running(site)
    finally:
        _ignore_signals()
        site.stop()


def _make(root: Path, wishes: Wishes) -> Topology:
    if wishes.topology == "cluster":
        return ClusterTopology(root)
    return _TOPOLOGIES[wishes.topology](root, wishes.port_base)


def _tell_story(site: Topology) -> None:
    alice, bob = site.pair
    Exchange(alice, bob, _say).run()
    Exchange(bob, alice, _say).run()
    _say("\nBoth ways as it should be.")
    if isinstance(site, TwoSites):
        CutStory(site.cable, site.key_providers, _say).run()
    if isinstance(site, ClusterTopology):
        LostNodesStory(site.mysql_servers, site.rabbitmq_servers, site.key_providers, _say).run()


def _keep_running(site: Topology) -> None:
    supervisor = Supervisor(site.mysql_servers, site.rabbitmq_servers, site.key_providers, _DEMO_DIR / "state.json")
    supervisor.write_state()
    _say(_how_to_go_on(site))
    while True:
        supervisor.check()
        if isinstance(site, TwoSites):
            _cut_as_wished(site)
        time.sleep(CHECK_SECONDS)


def _cut_as_wished(sites: TwoSites) -> None:
    """The line is cut for as long as a file of that name is there."""
    wish = (_DEMO_DIR / "cut").exists()
    if wish and not sites.cable.is_cut:
        sites.cable.cut()
        _say("the line between the sites is cut")
    elif sites.cable.is_cut and not wish:
        sites.cable.heal()
        _say("the line between the sites is healed")


def _how_to_go_on(site: Topology) -> str:
    alice, bob = site.pair
    lines = [
        "",
        "Try it:",
        "",
        f"  curl '{alice.url}{request_target('key', remoteSystemID=bob.system_id)}'",
        f"  curl '{bob.url}/key/<keyId>?remoteSystemID={alice.system_id}'",
        f"  curl '{alice.url}/capabilities'",
        f"  curl '{alice.url}/entropy?minentropy=512'",
        f"  curl '{alice.url}/status/sync'",
        f"  curl '{bob.url}/health'",
        "",
        "Over TLS, with a client certificate or a pre-shared key (in the state file):",
        "",
        *_tls_lines(alice),
        "",
        *(_CUT_LINES if isinstance(site, TwoSites) else []),
        f"Logs:   {site.logs}",
        f"State:  {_DEMO_DIR / 'state.json'} (addresses, process ids, the database's password, TLS keys)",
        "",
        "Kill any of the processes and watch it come back. Ctrl-C ends everything.",
    ]
    return "\n".join(lines)


def _tls_lines(kp: KeyProvider) -> list[str]:
    if kp.tls is None:
        return []
    tls = kp.tls
    return [
        f"  cd {tls.folder}",
        "  curl --cacert ca.pem --cert client.pem --key client.key " + f"'{tls.url}/capabilities'",
        f"  openssl s_client -connect {tls.address} -psk_identity {tls.psk_identity} -psk <psk_hex>",
    ]


def _read_wishes(environ: Mapping[str, str]) -> Wishes:
    topology = environ.get("TOPOLOGY", "") or "store"
    if topology not in _SERVERS:
        raise UsageError(f"TOPOLOGY={topology} is none of {', '.join(_SERVERS)}")
    once = environ.get("ONCE", "") not in ("", "0")
    return Wishes(once, _read_port_base(environ.get("PORT_BASE", ""), topology), topology)


def _read_port_base(text: str, topology: str) -> int | None:
    if not text:
        return None
    if topology not in _TOPOLOGIES:
        raise UsageError(f"PORT_BASE={text}: a demo with TOPOLOGY={topology} takes free ports; leave PORT_BASE out")
    last = 65536 - len(_TOPOLOGIES[topology].PORTS)
    if not text.isdecimal() or not 1024 <= int(text) <= last:
        raise UsageError(f"PORT_BASE={text} is not a port number from 1024 to {last}")
    return int(text)


@contextmanager
def _only_demo_here() -> Iterator[None]:
    """One demo a clone: `.demo` speaks of one only. The kernel frees the lock of a demo that was killed."""
    with Path(__file__).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError("another demo runs in this clone; stop it first") from None
        yield


@contextmanager
def _folder() -> Iterator[Path]:
    """The temporary folder, and `.demo` to name it: the next demo clears up after one that was killed."""
    _remove_leftovers()
    root = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX))
    try:
        _DEMO_DIR.mkdir(mode=0o700)
        write_private(_DEMO_DIR / "folder", str(root))
        yield root
    finally:
        shutil.rmtree(_DEMO_DIR, ignore_errors=True)
        if not (root / "kept").exists():
            shutil.rmtree(root, ignore_errors=True)


def _remove_leftovers() -> None:
    try:
        folder = Path((_DEMO_DIR / "folder").read_text())
    except OSError:
        pass
    else:
        if folder.name.startswith(_FOLDER_PREFIX):
            remove_folder_of_cluster(folder)
            shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(_DEMO_DIR, ignore_errors=True)


def _keep_logs(root: Path) -> Path:
    """Remove data, keyrings and passwords; the logs stay."""
    for entry in root.iterdir():
        if entry.name != "logs":
            shutil.rmtree(entry, ignore_errors=True)
    (root / "kept").touch()
    return root / "logs"


@contextmanager
def _signals_stop() -> Iterator[None]:
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    # nohup has it ignored, so that the demo may outlive the terminal.
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _stop)
    yield


def _stop(_number: int, _frame: FrameType | None) -> None:
    _ignore_signals()
    raise Stopped


def _ignore_signals() -> None:
    """Everything is being stopped: an impatient second Ctrl-C must not leave half of it running."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
