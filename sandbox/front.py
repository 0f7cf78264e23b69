"""HAProxy before two apis, by the very configuration that operators are given (`compose/haproxy.cfg`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sandbox.ports import LOOPBACK, answers, free_port
from sandbox.processes import Child, Startable, find_program, minimal_environ

_CONFIGURATION = Path(__file__).resolve().parent.parent / "compose" / "haproxy.cfg"
_START_SECONDS = 10.0


class Front(Startable):
    """One HAProxy, on free ports of this machine."""

    def __init__(self, root: Path, api_ports: Sequence[int]) -> None:
        """`api_ports` are the ports of the two apis."""
        self.port = free_port()
        self.status_port = free_port()
        self.log = root / "haproxy.log"
        self._root = root
        self._api_ports = api_ports
        self.child: Child | None = None

    def start(self) -> None:
        command = [find_program("haproxy"), "-db", "-f", str(_CONFIGURATION)]
        self.child = Child(command, environ=self._environ(), log=self.log, cwd=self._root)
        # Not its main port: a connection there goes to an api.
        self.child.wait_ready(lambda: answers(self.status_port), "HAProxy", _START_SECONDS)

    def stop(self) -> None:
        if self.child is not None:
            self.child.stop(2)

    def _environ(self) -> dict[str, str]:
        api_a, api_b = (f"{LOOPBACK}:{port}" for port in self._api_ports)
        return {
            **minimal_environ(self._root),
            "FRONT_BIND": f"{LOOPBACK}:{self.port}",
            "FRONT_STATUS": f"{LOOPBACK}:{self.status_port}",
            "API_A": api_a,
            "API_B": api_b,
        }
