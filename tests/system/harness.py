"""What the system tests share: key providers over one store, keys that were handed out, and raw HTTP.

A `Lab` is a store, a broker and the key providers of one test or module. It remembers every key that was handed
out, and when it is closed it searches all its logs for them, for passwords and for stack traces. Processes are
started from the main thread only: the kernel ends a child with the thread that started it.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias
from urllib.parse import urlencode

import pymysql
import pymysql.cursors

from sandbox.client import Key, get
from sandbox.key_provider import KeyProvider
from sandbox.mariadb import Database
from sandbox.ports import LOOPBACK
from skipbus.shared.store.migrate import bring_up_to_date
from skipbus_testkit.client import Answer
from tests.system.needles import Needles, private_keys

ALICE, BOB = "KP_Alice", "KP_Bob"
Store: TypeAlias = "pymysql.connections.Connection[pymysql.cursors.Cursor]"


@dataclass(frozen=True)
class RawAnswer:
    """Status, headers (names in lower case) and body as they came over the socket."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    @property
    def json(self) -> dict[str, Any]:
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value

    @property
    def error(self) -> str:
        return str(self.json["error"])


@dataclass(frozen=True)
class Place:
    """A store and a broker."""

    database: Database
    rabbitmq_url: str = field(repr=False)


class Lab:
    """Key providers over one store and one broker, unless they are put elsewhere."""

    def __init__(self, root: Path, *places: Place) -> None:
        """Key providers are put at the first place unless another one is named."""
        self.root = root
        self.places = list(places)
        self.database = places[0].database
        self.rabbitmq_url = places[0].rabbitmq_url
        self.kps: dict[str, KeyProvider] = {}
        self.handed_out: list[Key] = []
        self.log_dirs: list[Path] = []

    def add(
        self,
        system_id: str,
        *remote_ids: str,
        folder: str | None = None,
        env: Mapping[str, str] | None = None,
        at: Place | None = None,
    ) -> KeyProvider:
        """A key provider that is not started yet. Another folder of the same id is another host."""
        place = at or self.places[0]
        if place not in self.places:
            self.places.append(place)
        kp = KeyProvider(
            system_id,
            remote_ids,
            place.database,
            place.rabbitmq_url,
            root=self.root / (folder or system_id),
            env_overrides=env,
        )
        self.kps[folder or system_id] = kp
        self.log_dirs.append(kp.log_dir)
        return kp

    def add_pair(self, **env: str) -> tuple[KeyProvider, KeyProvider]:
        """KP_Alice and KP_Bob, running, each able to seal to the other."""
        alice, bob = self.add(ALICE, BOB, env=env), self.add(BOB, ALICE, env=env)
        for kp in (alice, bob):
            kp.start_all()
        for kp in (alice, bob):
            kp.wait_healthy(60)
        self.wait_announced(alice, BOB)
        self.wait_announced(bob, ALICE)
        return alice, bob

    def wait_announced(self, source: KeyProvider, target_id: str) -> None:
        """Wait until `source` can seal to `target_id`."""
        self.remember(source, target_id, source.wait_key(target_id))

    def issue(self, source: KeyProvider, target_id: str, size: str = "256") -> Key:
        answer = get(source.url, "key", remoteSystemID=target_id, size=size)
        assert answer.status == 200, f"GET /key answered {answer.status} {answer.error}"
        return self.remember(source, target_id, answer)

    def retrieve(self, kp: KeyProvider, key: Key) -> Answer:
        """`GET /key/{keyId}` as the encryptor at `kp` would ask for a key from `key.source`."""
        return get(kp.url, "key", key.key_id, remoteSystemID=key.source)

    def assert_retrievable(self, key: Key) -> None:
        """The target hands out this very key."""
        answer = self.retrieve(self.kps[key.target], key)
        assert answer.status == 200, f"{key.key_id}: {answer.status} {answer.error}"
        assert answer.body == {"keyId": key.key_id, "key": key.key}

    def needles(self) -> Needles:
        """All that no log may hold: keys, passwords, private keys."""
        needles = Needles()
        for place in self.places:
            secrets = {"MySQL password": place.database.password, "RabbitMQ URL": place.rabbitmq_url}
            secrets["RabbitMQ password"] = place.rabbitmq_url.partition("://")[2].partition("@")[0].partition(":")[2]
            needles.add_texts(secrets)
        for key in self.handed_out:
            needles.add_key(f"key {key.key_id}", bytes.fromhex(key.key))
        for kp in self.kps.values():
            needles.add_texts(private_keys(kp.keyring_dir))
        return needles

    def logs(self) -> list[Path]:
        return [log for folder in self.log_dirs for log in folder.glob("*.log")]

    def close(self) -> None:
        """End every process; then no log may hold a secret or a stack trace."""
        for kp in self.kps.values():
            kp.terminate_all()
        needles = self.needles()
        for kp in self.kps.values():
            kp.stop_all()
        assert needles.found_in_files(self.logs()) == []
        assert tracebacks(self.logs()) == []

    def __enter__(self) -> Self:
        """Migrates the stores, once instead of in every process that starts."""
        for place in self.places:
            bring_up_to_date(place.database.settings)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def remember(self, source: KeyProvider, target_id: str, answer: Answer) -> Key:
        """What was handed out, so that logs can be searched for it."""
        key = Key(source.system_id, target_id, answer.body["keyId"], answer.body["key"])
        self.handed_out.append(key)
        return key


def tracebacks(logs: list[Path]) -> list[str]:
    """Log lines that hold a stack trace."""
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    return [line[:2000] for line in lines if "Traceback" in line]


def log_lines(kp: KeyProvider, role: str) -> list[dict[str, Any]]:
    """The JSON lines of one process's log; others are an error. A last line without an end is being written."""
    whole, _, _ = kp.log_of(role).read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def request_bytes(target: str | bytes, *, method: str = "GET", headers: str = "", host: str = "kp.example") -> bytes:
    """One HTTP/1.1 request, its target as it is given, whatever is wrong with it."""
    raw_target = target.encode("latin-1") if isinstance(target, str) else target
    return b"%b %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (
        method.encode(),
        raw_target,
        host.encode(),
        headers.encode("latin-1"),
    )


def key_target(*path: str, **query: str) -> str:
    return "/" + "/".join(("key", *path)) + "?" + urlencode(query)


class RawConnection:
    """One keep-alive connection that sends what it is given and reads answers."""

    def __init__(self, port: int, timeout_seconds: float = 10) -> None:
        self.socket = socket.create_connection((LOOPBACK, port), timeout=timeout_seconds)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self, method: str = "GET") -> RawAnswer:
        """The next answer. Raises OSError when there is none."""
        status_line = self._buffer.readline(8192)
        if not status_line:
            raise ConnectionResetError("the connection was closed without an answer")
        headers = http.client.parse_headers(self._buffer)
        length = 0 if method == "HEAD" else int(headers.get("Content-Length", "0"))
        fields = {name.lower(): value for name, value in headers.items()}
        return RawAnswer(int(status_line.split()[1]), fields, self._buffer.read(length))

    def ask(self, target: str | bytes, *, method: str = "GET", headers: str = "") -> RawAnswer:
        self.send(request_bytes(target, method=method, headers=headers))
        return self.read(method)

    def is_ended(self) -> bool:
        """Whether the server has ended the connection; waits for the socket's timeout."""
        try:
            return self._buffer.read(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False

    def close(self) -> None:
        self._buffer.close()
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ask(kp: KeyProvider, target: str | bytes, *, method: str = "GET", headers: str = "") -> RawAnswer:
    """One request on a connection of its own, its target sent as it is."""
    with RawConnection(kp.port) as connection:
        return connection.ask(target, method=method, headers=headers)


def rows(database: Database, statement: str, *values: object) -> tuple[tuple[Any, ...], ...]:
    """What a query finds, committed by any client."""
    with database.connect() as connection:
        return query(connection, statement, *values)


def query(connection: Store, statement: str, *values: object) -> tuple[tuple[Any, ...], ...]:
    with connection.cursor() as cursor:
        cursor.execute(statement, values or None)
        return cursor.fetchall()


def count_records(connection: Store) -> int:
    return int(query(connection, "SELECT COUNT(*) FROM key_records")[0][0])


@contextmanager
def in_background(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Runs `work(stop)` in a thread during the block. What it raises fails the test."""
    stop, failures = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            work(stop)
        except BaseException as error:  # noqa: BLE001 -- raised again in the test's own thread
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive(), "the background work did not end"
    if failures:
        raise failures[0]
