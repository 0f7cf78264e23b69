"""Pairs of encryptors that exchange keys all the time, whatever happens to the key providers."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from sandbox.client import Key, get
from sandbox.key_provider import KeyProvider
from skipbus_testkit.client import Answer
from tests.system.bus_links import HEALED_SECONDS
from tests.system.harness import Lab
from tests.waiting import wait_for

_AT_ONCE = 50


class Encryptors:
    """Each way is one encryptor at the source and one at the target. Every second key is fetched only in the end."""

    def __init__(self, lab: Lab, *ways: tuple[KeyProvider, KeyProvider], pause_seconds: float = 0.05) -> None:
        self._lab = lab
        self._ways = ways
        self._pause_seconds = pause_seconds
        self.outcomes: Counter[tuple[str, int]] = Counter()
        self.errors: list[str] = []
        self.waiting: list[Key] = []
        self.given_out: list[Key] = []
        # Their answers were lost with a process, so they may or may not have been given out.
        self.cut_off: list[Key] = []

    def run(self, stop: threading.Event) -> None:
        """To be run in the background."""
        while not stop.wait(self._pause_seconds):
            for source, target in self._ways:
                self._exchange(source, target)

    def wait_for_more(self, count: int = 10, timeout_seconds: float = HEALED_SECONDS) -> None:
        """Keys are being handed out on all ways."""
        wanted = {source.system_id: self.outcomes[source.system_id, 200] + count for source, _ in self._ways}
        wait_for(
            lambda: all(self.outcomes[name, 200] >= more for name, more in wanted.items()),
            timeout_seconds=timeout_seconds,
        )

    @property
    def statuses(self) -> set[int]:
        """All statuses that requests for keys were answered with; 0 where there was no answer."""
        return {status for _, status in self.outcomes}

    @property
    def failed(self) -> int:
        """Requests for keys that were not answered with one."""
        return sum(count for (_, status), count in self.outcomes.items() if status != 200)

    def assert_nothing_lost_and_nothing_twice(self) -> None:
        for key in self.waiting:
            self._lab.assert_retrievable(key)
        # Each is waited for, as a key that may yet arrive, so all are asked for at once.
        keys = [*self.waiting, *(key for key in self.given_out if key not in self.cut_off)]
        with ThreadPoolExecutor(min(_AT_ONCE, max(1, len(keys)))) as pool:
            statuses = list(pool.map(lambda key: self._lab.retrieve(self._lab.kps[key.target], key).status, keys))
        assert set(statuses) <= {400}, "a key was given out twice"

    def _exchange(self, source: KeyProvider, target: KeyProvider) -> None:
        answer = self._ask(source, target.system_id)
        self.outcomes[source.system_id, answer.status] += 1
        if answer.status != 200:
            self.errors.append(f"{source.system_id}: {answer.status} {answer.error}")
            return
        key = Key(source.system_id, target.system_id, answer.body["keyId"], answer.body["key"])
        self._lab.handed_out.append(key)
        (self.given_out if len(self._lab.handed_out) % 2 and self._fetch(target, key) else self.waiting).append(key)

    def _ask(self, source: KeyProvider, target_id: str) -> Answer:
        try:
            return get(source.url, "key", timeout_seconds=20, remoteSystemID=target_id)
        except (OSError, ValueError):
            return Answer(0, {}, b"")

    def _fetch(self, target: KeyProvider, key: Key) -> bool:
        """Whether the target gave it out. One that could not is asked again in the end."""
        try:
            answer = self._lab.retrieve(target, key)
        except (OSError, ValueError):
            self.cut_off.append(key)
            return True
        if answer.status == 500:
            # A claim that was under way when the store went: the key is given out at most once.
            self.cut_off.append(key)
            return True
        if answer.status != 200:
            return False
        assert answer.body["key"] == key.key
        return True
