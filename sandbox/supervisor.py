"""Restarts what dies, as Compose's `restart: always` would, and tells where everything runs.

It owns no process: it looks at those of the servers and key providers that it is given, and starts them again
after half a second, then ever later up to five seconds while they do not stay up. A server that someone has
started by hand on our port is left in peace. It is called from the caller's own loop, because the kernel
ends a child when the thread that started it ends.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from sandbox.key_provider import ROLES, KeyProvider
from sandbox.mariadb import MariaDbServer
from sandbox.ports import answers
from sandbox.processes import write_private
from sandbox.rabbitmq import RabbitMqServer
from sandbox.server import Server

FIRST_DELAY_SECONDS = 0.5
LONGEST_DELAY_SECONDS = 5.0
# Whatever ran this long had started well: its next death is a new story.
SETTLED_SECONDS = 10.0


class Unit(Protocol):
    """One thing that is to run."""

    @property
    def pid(self) -> int: ...

    def is_up(self) -> bool: ...

    def revive(self) -> None: ...


class RoleUnit:
    """One process of a key provider."""

    def __init__(self, key_provider: KeyProvider, role: str) -> None:
        self._key_provider = key_provider
        self._role = role

    @property
    def pid(self) -> int:
        return self._key_provider.processes[self._role].pid

    def is_up(self) -> bool:
        return self._key_provider.processes[self._role].running

    def revive(self) -> None:
        # Workers that outlived their parent would keep serving with no one to stop them.
        self._key_provider.kill(self._role)
        self._key_provider.start(self._role)


class ServerUnit:
    """One server."""

    def __init__(self, server: Server) -> None:
        self._server = server

    @property
    def pid(self) -> int:
        if self._server.running:
            return self._server.pid
        return self._server.adopted_pid or self._server.pid

    def is_up(self) -> bool:
        # A server that an operator started by hand on this port and data folder counts as well.
        return self._server.running or answers(self._server.port)

    def revive(self) -> None:
        self._server.kill()
        self._server.launch()


class Watch:
    """When one unit was last seen up and when it is due to be started again."""

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        self._delay_seconds = FIRST_DELAY_SECONDS
        self._up_since: float | None = None
        self._due: float | None = None

    def check(self, now: float) -> None:
        if self._unit.is_up():
            self._seen_up(now)
        elif self._due is None:
            self._up_since, self._due = None, now + self._delay_seconds
        elif now >= self._due:
            self._due = None
            self._delay_seconds = min(self._delay_seconds * 2, LONGEST_DELAY_SECONDS)
            self._unit.revive()

    def _seen_up(self, now: float) -> None:
        self._due = None
        self._up_since = self._up_since or now
        if now - self._up_since >= SETTLED_SECONDS:
            self._delay_seconds = FIRST_DELAY_SECONDS


class Supervisor:
    """Keeps the servers and the processes of the key providers running, and `state_file` true."""

    def __init__(
        self,
        mysql: Sequence[MariaDbServer],
        rabbitmq: Sequence[RabbitMqServer],
        key_providers: Sequence[KeyProvider],
        state_file: Path,
    ) -> None:
        self._mysql = [(server, ServerUnit(server)) for server in mysql]
        self._rabbitmq = [(server, ServerUnit(server)) for server in rabbitmq]
        self._key_providers = key_providers
        self._state_file = state_file
        self._written: dict[str, Any] = {}
        units: list[Unit] = [RoleUnit(kp, role) for kp in key_providers for role in ROLES]
        units += [unit for _, unit in (*self._mysql, *self._rabbitmq)]
        self._watches = [Watch(unit) for unit in units]

    def check(self) -> None:
        """Look at everything once; to be called several times a second."""
        now = time.monotonic()
        for watch in self._watches:
            watch.check(now)
        self.write_state()

    def write_state(self) -> None:
        """Put the state file in place in one step, when anything in it has changed."""
        state = self._state()
        if state == self._written:
            return
        draft = self._state_file.with_suffix(".new")
        write_private(draft, json.dumps(state, indent=2) + "\n")
        draft.replace(self._state_file)
        self._written = state

    def _state(self) -> dict[str, Any]:
        return {
            "kps": _key_provider_states(self._key_providers),
            "mysql": [_mysql_state(server, unit.pid) for server, unit in self._mysql],
            "rabbitmq": [{"url": server.url, "pid": unit.pid} for server, unit in self._rabbitmq],
        }


def _mysql_state(server: MariaDbServer, pid: int) -> dict[str, Any]:
    return {
        "host": server.host,
        "port": server.port,
        "user": server.user,
        "password": server.password,
        "database": server.database,
        "pid": pid,
        "datadir": str(server.datadir),
    }


def _key_provider_states(key_providers: Sequence[KeyProvider]) -> dict[str, Any]:
    """By system id. One that has several hosts is described by the first, and has the processes of all of them."""
    states: dict[str, Any] = {}
    for kp in key_providers:
        if (first := states.get(kp.system_id)) is None:
            states[kp.system_id] = _key_provider_state(kp)
            continue
        first.setdefault("other_http", []).append(kp.url)
        for role, child in kp.processes.items():
            first["processes"][role].append(child.pid)
    return states


def _key_provider_state(key_provider: KeyProvider) -> dict[str, Any]:
    return {
        "http": key_provider.url,
        "processes": {role: [child.pid] for role, child in key_provider.processes.items()},
        "keyring": str(key_provider.keyring_dir),
        "log_dir": str(key_provider.log_dir),
        **(key_provider.tls.state() if key_provider.tls is not None else {}),
    }
