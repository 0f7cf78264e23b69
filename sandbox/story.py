"""The stories that the demo tells, each sentence checked: one key reaches both ends and nobody else; a line is cut."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sandbox.cable import Cable
from sandbox.client import get
from sandbox.key_provider import KeyProvider, stock_of
from sandbox.processes import SandboxError, wait_until
from sandbox.server import Server
from skipbus_testkit.client import Answer, request_target

KEY_HEX_DIGITS = 64
# More than half of the stock, so that it is being filled up again when the line heals.
EXCHANGES = 40
FULL_SECONDS = 30.0
# A cluster notices within 3 s that a node is gone; a process connects again within as long.
SERVED_SECONDS = 20.0
COUNTED_SECONDS = 10.0

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Exchange:
    """One key's way from the encryptor at `source` to the encryptor at `target`."""

    source: KeyProvider
    target: KeyProvider
    tell: Tell

    def run(self) -> None:
        """Raises SandboxError at the first answer that is not as it should be."""
        source_id, target_id = self.source.system_id, self.target.system_id
        self.tell(f"{source_id} -> {target_id}")
        issued = self._issue()
        key_id = str(issued.body["keyId"])
        self._refused("wrong remoteSystemID", self.target, key_id, "KP_Mallory")
        self._refused("the wrong key provider", self.source, key_id, target_id)
        retrieved = self._retrieve(key_id)
        if retrieved.body != issued.body:
            raise SandboxError("the two ends were given different keys")
        self._refused("a second time", self.target, key_id, source_id)

    def _issue(self) -> Answer:
        answer = self.source.wait_key(self.target.system_id)
        if len(answer.body.get("key", "")) != KEY_HEX_DIGITS:
            raise SandboxError("GET /key answered with a key of another size")
        self._say("200", self.source, request_target("key", remoteSystemID=self.target.system_id))
        self._say_key(answer)
        return answer

    def _retrieve(self, key_id: str) -> Answer:
        remote_id = self.source.system_id
        answer = get(self.target.url, "key", key_id, remoteSystemID=remote_id)
        if answer.status != 200:
            raise SandboxError(f"GET /key/{{keyId}} answered {answer.status} {answer.error}")
        self._say("200", self.target, request_target("key", key_id, remoteSystemID=remote_id))
        self._say_key(answer)
        return answer

    def _refused(self, what: str, at: KeyProvider, key_id: str, remote_id: str) -> None:
        answer = get(at.url, "key", key_id, remoteSystemID=remote_id)
        if answer.status != 400 or "key" in answer.body:
            raise SandboxError(f"a retrieval ({what}) should be refused, but was answered {answer.status}")
        self._say("400", at, request_target("key", key_id, remoteSystemID=remote_id))
        self.tell(f"         refused, {what}: {answer.error}")

    def _say(self, status: str, at: KeyProvider, request: str) -> None:
        self.tell(f"    {status}  {at.system_id:<8}  GET {request}")

    def _say_key(self, answer: Answer) -> None:
        # Not even the demo shows a whole key.
        self.tell(f"         keyId {answer.body['keyId']}  key {answer.body['key'][:8]}…")


@dataclass(frozen=True)
class CutStory:
    """A cut of the cable between two key providers that keep stock at each other."""

    cable: Cable
    key_providers: Sequence[KeyProvider]
    tell: Tell

    def run(self) -> None:
        """Raises SandboxError at the first thing that is not as it should be. At the end the cable is whole again."""
        one, other = self.key_providers
        self._wait_full()
        self.tell("\nThe line between the sites is cut.")
        self.cable.cut()
        try:
            for source, target in ((one, other), (other, one)):
                for _ in range(EXCHANGES):
                    exchange_once(source, target)
                left = self._left(source, target)
                self.tell(f"    {EXCHANGES} exchanges {source.system_id} -> {target.system_id} from stock, {left} left")
        finally:
            self.cable.heal()
        healed = time.monotonic()
        self.tell("The line is healed.")
        self._wait_full()
        self.tell(f"    stock full again after {time.monotonic() - healed:.1f} s")

    def _left(self, source: KeyProvider, target: KeyProvider) -> int:
        """What is left at the target, once it has been counted again."""
        most = int(stock_of(source, target.system_id)["configured"]) - EXCHANGES
        wait_until(
            lambda: stock_of(source, target.system_id)["placed"] <= most,
            lambda: f"stock that was given out is still counted: {stock_of(source, target.system_id)}",
            COUNTED_SECONDS,
        )
        return int(stock_of(source, target.system_id)["placed"])

    def _wait_full(self) -> None:
        one, other = self.key_providers
        for source, target in ((one, other), (other, one)):
            wait_full(source, target)


@dataclass(frozen=True)
class LostNodesStory:
    """A node of each cluster is killed, one after the other, while keys are exchanged; then both come back."""

    databases: Sequence[Server]
    brokers: Sequence[Server]
    key_providers: Sequence[KeyProvider]
    tell: Tell

    def run(self) -> None:
        """Raises SandboxError at the first thing that is not as it should be. At the end all nodes run."""
        # The first host of each key provider uses the first nodes.
        lost = {"database": self.databases[0], "broker": self.brokers[0]}
        for what, node in lost.items():
            self.tell(f"\nA node of the {what} cluster is killed.")
            node.kill()
            self._exchange()
        for what, node in lost.items():
            node.start()
            self.tell(f"The node of the {what} cluster is back.")
        self._exchange()

    def _exchange(self) -> None:
        """Between all hosts of both key providers, as soon as each of them serves."""
        started = time.monotonic()
        pairs = [(s, t) for s in self.key_providers for t in self.key_providers if s.system_id != t.system_id]
        for source, target in pairs:
            wait_until(lambda s=source, t=target: _serves(s, t), f"{source.url} to serve", SERVED_SECONDS)  # type: ignore[misc]
        seconds = time.monotonic() - started
        for number in range(EXCHANGES):
            exchange_once(*pairs[number % len(pairs)])
        self.tell(f"    all hosts serve after {seconds:.1f} s; {EXCHANGES} exchanges between them")


def _serves(source: KeyProvider, target: KeyProvider) -> bool:
    try:
        exchange_once(source, target)
    except (SandboxError, OSError):
        return False
    return True


def exchange_once(source: KeyProvider, target: KeyProvider) -> None:
    """One key to both ends. Raises SandboxError."""
    issued = get(source.url, "key", remoteSystemID=target.system_id)
    if issued.status != 200:
        raise SandboxError(f"GET /key at {source.system_id} answered {issued.status} {issued.error}")
    retrieved = get(target.url, "key", str(issued.body["keyId"]), remoteSystemID=source.system_id)
    if retrieved.status != 200:
        raise SandboxError(f"GET /key/{{keyId}} at {target.system_id} answered {retrieved.status} {retrieved.error}")
    if retrieved.body != issued.body:
        raise SandboxError("the two ends were given different keys")


def is_full(source: KeyProvider, target: KeyProvider) -> bool:
    stock = stock_of(source, target.system_id)
    return bool(stock) and stock["placed"] >= stock["configured"]


def wait_full(source: KeyProvider, target: KeyProvider, timeout_seconds: float = FULL_SECONDS) -> None:
    """Wait until the stock of `source` at `target` is what is configured. Raises SandboxError."""
    wait_until(
        lambda: is_full(source, target),
        lambda: f"stock of {source.system_id}: {stock_of(source, target.system_id)}",
        timeout_seconds,
    )
