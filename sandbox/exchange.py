"""The story that the demo tells, each sentence checked: one key reaches both ends, and nobody else."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from sandbox.client import get
from sandbox.key_provider import KeyProvider
from sandbox.processes import SandboxError
from skipbus_testkit.client import Answer, target

# A key provider seals only to a peer that has announced itself, which may be a moment after both are healthy.
ANNOUNCED_SECONDS = 30.0
KEY_HEX_DIGITS = 64

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
        answer = self._issue_once_announced()
        if answer.status != 200 or len(answer.body.get("key", "")) != KEY_HEX_DIGITS:
            raise SandboxError(f"GET /key answered {answer.status} {answer.error}")
        self._say("200", self.source, target("key", remoteSystemID=self.target.system_id))
        self._say_key(answer)
        return answer

    def _issue_once_announced(self) -> Answer:
        deadline = time.monotonic() + ANNOUNCED_SECONDS
        while True:
            answer = get(self.source.url, "key", remoteSystemID=self.target.system_id)
            if answer.status not in (500, 503) or time.monotonic() > deadline:
                return answer
            time.sleep(0.1)

    def _retrieve(self, key_id: str) -> Answer:
        remote_id = self.source.system_id
        answer = get(self.target.url, "key", key_id, remoteSystemID=remote_id)
        if answer.status != 200:
            raise SandboxError(f"GET /key/{{keyId}} answered {answer.status} {answer.error}")
        self._say("200", self.target, target("key", key_id, remoteSystemID=remote_id))
        self._say_key(answer)
        return answer

    def _refused(self, what: str, at: KeyProvider, key_id: str, remote_id: str) -> None:
        answer = get(at.url, "key", key_id, remoteSystemID=remote_id)
        if answer.status != 400 or "key" in answer.body:
            raise SandboxError(f"a retrieval ({what}) should be refused, but was answered {answer.status}")
        self._say("400", at, target("key", key_id, remoteSystemID=remote_id))
        self.tell(f"         refused, {what}: {answer.error}")

    def _say(self, status: str, at: KeyProvider, request: str) -> None:
        self.tell(f"    {status}  {at.system_id:<8}  GET {request}")

    def _say_key(self, answer: Answer) -> None:
        # Not even the demo shows a whole key.
        self.tell(f"         keyId {answer.body['keyId']}  key {answer.body['key'][:8]}…")
