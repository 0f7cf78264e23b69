"""``python -m bench.modules_per_flow``: through which of our modules a request passes, in each process.

A demo over a store link and one of two sites run with a profiler in every process (``bench.traced``). Each flow is
repeated; a module counts when it was executed between request and answer in most of the fastest runs, so that what a
process does once a second does not count, even on a slow machine. Only modules whose functions run are counted, not
those that are only imported.
"""

from __future__ import annotations

import json
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.progress import tell
from bench.traced import SOCKET_VARIABLE
from sandbox.client import get
from sandbox.key_provider import ROLES, KeyProvider
from sandbox.processes import SandboxError
from sandbox.story import wait_full
from sandbox.topology import SharedStore, Topology
from sandbox.two_sites import TwoSites
from skipbus_testkit.client import Answer

_RUNS = 30
_FASTEST = 10
_ON_DEMAND_BITS = "512"
# What one run leaves to be done is done before the next one begins.
_PAUSE_SECONDS = 0.3

Modules = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Flow:
    """One kind of request, and through which modules it passed: process -> its modules."""

    name: str
    modules: Modules

    @property
    def distinct(self) -> int:
        return len({module for modules in self.modules.values() for module in modules})

    @property
    def in_all(self) -> int:
        return sum(len(modules) for modules in self.modules.values())

    def shown(self) -> str:
        """The flow, its processes, and their modules."""
        head = f"{self.name}: {self.distinct} modules" + (f", {self.in_all} in all processes" if self._several else "")
        lines = [f"  {process} ({len(modules)}): {', '.join(modules)}" for process, modules in self.modules.items()]
        return "\n".join([head, *lines])

    @property
    def _several(self) -> bool:
        return len(self.modules) > 1


class Tracer:
    """Asks the traced processes of some key providers."""

    def __init__(self, folder: Path, key_providers: Sequence[KeyProvider]) -> None:
        """To be made before the key providers start."""
        self._folder = folder
        self._names = [(kp.system_id, role) for kp in key_providers for role in ROLES]
        self._sockets: dict[str, socket.socket] = {}
        for kp in key_providers:
            kp.run_module = ("-m", "bench.traced")
            for role in ROLES:
                kp.environ_of.setdefault(role, {})[SOCKET_VARIABLE] = str(self._path(kp.system_id, role))

    def flow(self, name: str, run: Callable[[], Answer], prepare: Callable[[], None] = lambda: None) -> Flow:
        """Repeats a request. Raises SandboxError when one is refused."""
        runs: list[tuple[float, dict[str, list[str]]]] = []
        for _ in range(_RUNS):
            prepare()
            time.sleep(_PAUSE_SECONDS)
            self._executed()
            started = time.monotonic()
            answer = run()
            runs.append((time.monotonic() - started, self._executed()))
            if answer.status != 200:
                raise SandboxError(f"{name} was answered {answer.status} {answer.error}")
        return Flow(name, usual_modules(runs, _FASTEST))

    def close(self) -> None:
        for connection in self._sockets.values():
            connection.close()

    def _executed(self) -> dict[str, list[str]]:
        """Process -> modules that it has executed since it was last asked."""
        return {f"{role} of {system_id}": self._ask(system_id, role) for system_id, role in self._names}

    def _ask(self, system_id: str, role: str) -> list[str]:
        path = str(self._path(system_id, role))
        if path not in self._sockets:
            self._sockets[path] = socket.socket(socket.AF_UNIX)
            self._sockets[path].connect(path)
        self._sockets[path].sendall(b"\n")
        with self._sockets[path].makefile("rb") as answers:
            files: list[str] = json.loads(answers.readline())
        return [file.removesuffix(".py").replace("/", ".") for file in files]

    def _path(self, system_id: str, role: str) -> Path:
        return self._folder / f"{system_id}-{role}"


def usual_modules(runs: Sequence[tuple[float, Modules]], fastest: int) -> Modules:
    """Process -> the modules in most of the fastest runs, of runs that took some seconds each."""
    counts: dict[str, Counter[str]] = {}
    for _, executed in sorted(runs, key=lambda run: run[0])[:fastest]:
        for process, modules in executed.items():
            counts.setdefault(process, Counter()).update(modules)
    usual = {
        process: sorted(module for module, count in counted.items() if 2 * count > fastest)
        for process, counted in counts.items()
    }
    return {process: modules for process, modules in usual.items() if modules}


def store_link_flows(root: Path) -> list[Flow]:
    """`GET /key` and `GET /key/{keyId}` of two key providers over one store."""
    with _traced(SharedStore(_made(root / "store"))) as (tracer, alice, bob):
        alice.wait_key(bob.system_id, 120)
        return [_issuing(tracer, "store link, GET /key", alice, bob), _retrieving(tracer, "store link", alice, bob)]


def bus_link_flows(root: Path) -> list[Flow]:
    """The same at two sites, on demand and from stock."""
    with _traced(TwoSites(_made(root / "sites"), tls=False)) as (tracer, alice, bob):
        wait_full(alice, bob, 120)
        return [
            _issuing(tracer, "bus link, GET /key on demand", alice, bob, _ON_DEMAND_BITS),
            _issuing(tracer, "bus link, GET /key from stock", alice, bob),
            _retrieving(tracer, "bus link", alice, bob),
        ]


def _issuing(tracer: Tracer, name: str, alice: KeyProvider, bob: KeyProvider, bits: str = "256") -> Flow:
    return tracer.flow(name, lambda: get(alice.url, "key", remoteSystemID=bob.system_id, size=bits))


def _retrieving(tracer: Tracer, link: str, alice: KeyProvider, bob: KeyProvider) -> Flow:
    issued: list[str] = []

    def issue() -> None:
        issued.append(get(alice.url, "key", remoteSystemID=bob.system_id).body["keyId"])

    def retrieve() -> Answer:
        return get(bob.url, "key", issued.pop(), remoteSystemID=alice.system_id)

    return tracer.flow(f"{link}, GET /key/{{keyId}}", retrieve, issue)


@contextmanager
def _traced(site: Topology) -> Iterator[tuple[Tracer, KeyProvider, KeyProvider]]:
    try:
        site.start_servers()
        site.make_key_providers()
        with tempfile.TemporaryDirectory(prefix="skipbus-trace-") as folder:
            tracer = Tracer(Path(folder), site.key_providers)
            site.start_key_providers()
            alice, bob = site.key_providers
            yield tracer, alice, bob
            tracer.close()
    finally:
        site.stop()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def main() -> int:
    """Prints every flow."""
    with tempfile.TemporaryDirectory(prefix="skipbus-bench-") as root:
        tell("starting two key providers over one store")
        flows = store_link_flows(Path(root))
        tell("starting two sites")
        flows += bus_link_flows(Path(root))
    print("\n\n".join(flow.shown() for flow in flows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
