"""The second story of two sites, each sentence checked: the line is cut, stock serves, the line heals."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.cable import Cable
from sandbox.client import get
from sandbox.exchange import Tell
from sandbox.key_provider import KeyProvider
from sandbox.processes import SandboxError

# More than half of the stock, so that it is being filled up again when the line heals.
EXCHANGES = 40
FULL_SECONDS = 30.0
COUNTED_SECONDS = 10.0


@dataclass(frozen=True)
class CutStory:
    """A cut of the cable between two key providers that keep stock at each other."""

    cable: Cable
    key_providers: Sequence[KeyProvider]
    tell: Tell

    def run(self) -> None:
        """Raises SandboxError at the first thing that is not as it should be. The cable is whole afterwards."""
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
        most = int(stock_of(source, target)["configured"]) - EXCHANGES
        _wait(
            lambda: stock_of(source, target)["placed"] <= most,
            lambda: f"stock that was given out is still counted: {stock_of(source, target)}",
            COUNTED_SECONDS,
        )
        return int(stock_of(source, target)["placed"])

    def _wait_full(self) -> None:
        one, other = self.key_providers
        for source, target in ((one, other), (other, one)):
            wait_full(source, target)


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


def stock_of(source: KeyProvider, target: KeyProvider) -> dict[str, Any]:
    """What `source` says of its stock at `target`."""
    answer = get(source.url, "status", "sync")
    return dict(answer.body["peers"][target.system_id].get("stock") or {})


def is_full(source: KeyProvider, target: KeyProvider) -> bool:
    stock = stock_of(source, target)
    return bool(stock) and stock["placed"] >= stock["configured"]


def wait_full(source: KeyProvider, target: KeyProvider, timeout_seconds: float = FULL_SECONDS) -> None:
    """Wait until the stock of `source` at `target` is what is configured. Raises SandboxError."""
    _wait(
        lambda: is_full(source, target),
        lambda: f"stock of {source.system_id}: {stock_of(source, target)}",
        timeout_seconds,
    )


def _wait(condition: Callable[[], bool], what: Callable[[], str], timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SandboxError(f"waited {timeout_seconds:.0f} s in vain; {what()}")
        time.sleep(0.1)
