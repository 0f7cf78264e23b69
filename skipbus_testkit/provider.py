"""One key provider of a pair as the tester holds it: how to reach it, what it saw, and what shall happen to it."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from testcontainers.core.container import DockerContainer

from skipbus_testkit.client import Answer, Client, client_context

TLS_PORT = 8443
CONTROL_PORT = 9080
_ORDER_SECONDS = 10.0


@dataclass(frozen=True)
class RecordedRequest:
    """A request that the key provider saw: no body, so no key. ``proof`` is psk, certificate or none."""

    at_seconds: float
    method: str
    path: str
    query: str
    status: int
    duration_ms: float
    caller: str
    proof: str


@dataclass(frozen=True)
class Credentials:
    """What an encryptor needs to get in: a pre-shared key, or a certificate; and the authority of the key provider."""

    psk_identity: str
    psk_hex: str
    ca_file: Path
    client_cert_file: Path
    client_key_file: Path

    def __repr__(self) -> str:
        return f"<credentials of {self.psk_identity}>"


class KeyProvider:
    """``pair.alice`` or ``pair.bob``."""

    def __init__(
        self, name: str, system_id: str, container: DockerContainer, credentials: Credentials, token: str
    ) -> None:
        self.name = name
        self.system_id = system_id
        self.credentials = credentials
        self._container = container
        self._token = token

    def __repr__(self) -> str:
        return f"<KeyProvider {self.system_id}>"

    @cached_property
    def https_url(self) -> str:
        """Where encryptors on this machine reach it."""
        host = self._container.get_container_host_ip()
        return f"https://{host}:{self._container.get_exposed_port(TLS_PORT)}"

    @property
    def internal_url(self) -> str:
        """Where encryptors reach it that are containers in ``pair.network_name``."""
        return f"https://{self.name}:{TLS_PORT}"

    @property
    def psk_identity(self) -> str:
        """The identity of the pre-shared key."""
        return self.credentials.psk_identity

    @property
    def psk_hex(self) -> str:
        """The pre-shared key, 256 bits."""
        return self.credentials.psk_hex

    @property
    def ca_file(self) -> Path:
        """The authority of the key provider's certificate, in PEM."""
        return self.credentials.ca_file

    @property
    def client_cert_file(self) -> Path:
        """A client's certificate that it accepts, in PEM."""
        return self.credentials.client_cert_file

    @property
    def client_key_file(self) -> Path:
        """That certificate's private key, in PEM."""
        return self.credentials.client_key_file

    def get(self, *path: str, **query: str) -> Answer:
        """One request as an encryptor with the client certificate: ``get("key", remoteSystemID="KP_Bob")``."""
        return self._client.get(*path, **query)

    def slow(self, ms: int) -> None:
        """Every request takes ``ms`` milliseconds longer from now on; 0 ends it."""
        self._order("slow", ms=ms)

    def fail_next(self, path: str, status: int) -> None:
        """The next request for ``path`` is answered ``status`` and goes no further. ``/key/`` means any keyId."""
        self._order("fail", path=path, status=status)

    def pause(self) -> None:
        """Nothing of it runs until ``resume``: the kernel accepts connections, and they get no answer."""
        self._container.get_wrapped_container().pause()

    def resume(self) -> None:
        """It goes on where it was."""
        wrapped = self._container.get_wrapped_container()
        wrapped.reload()
        if wrapped.status == "paused":
            wrapped.unpause()

    def reset(self) -> None:
        """Neither paused, nor slow, nor failing; the recorded requests are forgotten."""
        self.resume()
        self._order("reset")

    @property
    def requests(self) -> list[RecordedRequest]:
        """The requests that it saw since the last ``reset``, the oldest first; at most 10,000."""
        return [RecordedRequest(**fields) for fields in self._ask("requests", None)]

    @property
    def logs(self) -> str:
        """What its processes logged."""
        out, err = self._container.get_logs()
        return (out + err).decode(errors="replace")

    @cached_property
    def _client(self) -> Client:
        certificate, key = str(self.client_cert_file), str(self.client_key_file)
        return Client(self.https_url, client_context(str(self.ca_file), certificate, key))

    def _order(self, order: str, **fields: object) -> None:
        self._ask(order, json.dumps(fields).encode())

    def _ask(self, question: str, body: bytes | None) -> Any:  # noqa: ANN401 -- JSON
        host = self._container.get_container_host_ip()
        url = f"http://{host}:{self._container.get_exposed_port(CONTROL_PORT)}/{question}"
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        request = urllib.request.Request(url, body, headers)
        with urllib.request.urlopen(request, timeout=_ORDER_SECONDS) as response:  # noqa: S310
            return json.load(response)
