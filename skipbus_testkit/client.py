"""An encryptor's HTTPS requests, by the standard library: one connection a request, certificates where they are given.

Leaves to others: what an answer should have been.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode, urlsplit


@dataclass(frozen=True)
class Answer:
    """One answer. The body may hold a key, so it stays out of the repr."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    content: bytes = field(repr=False)
    tls_version: str | None = None
    cipher: str | None = None

    @property
    def body(self) -> Any:  # noqa: ANN401 -- whatever JSON the key provider sent
        """The JSON body, or None where it is none."""
        try:
            return json.loads(self.content)
        except ValueError:
            return None

    @property
    def error(self) -> str:
        """The sentence of an error answer."""
        return str(self.body.get("error", "")) if isinstance(self.body, dict) else ""


@dataclass(frozen=True)
class Client:
    """Asks one key provider. ``url`` is https, or http for a plain port."""

    url: str
    context: ssl.SSLContext | None = field(repr=False, default=None)
    timeout_seconds: float = 15.0

    def get(self, *path: str, **query: str) -> Answer:
        """``GET url/path…?query``, escaped. Raises OSError where nobody answers."""
        return self.request("GET", request_target(*path, **query))

    def request(self, method: str, target: str, body: bytes | None = None) -> Answer:
        """One request, its target as it is. Raises OSError where nobody answers."""
        connection = self._connection()
        try:
            connection.connect()
            # Asked now, because an answer that ends the connection takes the socket away.
            tls = connection.sock if isinstance(connection.sock, ssl.SSLSocket) else None
            version, cipher = (tls.version(), tls.cipher()) if tls else (None, None)
            connection.request(method, target, body)
            response = connection.getresponse()
            content = response.read()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, headers, content, version, cipher and cipher[0])
        except http.client.HTTPException as error:
            raise OSError(f"broken answer: {error!r}") from error
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        address = urlsplit(self.url)
        host = address.hostname or ""
        if address.scheme == "http":
            return http.client.HTTPConnection(host, address.port, timeout=self.timeout_seconds)
        context = self.context or ssl.create_default_context()
        return http.client.HTTPSConnection(host, address.port, timeout=self.timeout_seconds, context=context)


def request_target(*path: str, **query: str) -> str:
    """The request target, with everything escaped that has to be."""
    text = "/" + "/".join(quote(part, safe="") for part in path)
    return f"{text}?{urlencode(query)}" if query else text


def client_context(
    ca_file: str | None, cert_file: str | None = None, key_file: str | None = None, *, verify: bool = True
) -> ssl.SSLContext:
    """A context for a client: whom it trusts (None for the system's authorities), and what it shows."""
    context = ssl.create_default_context(cafile=ca_file)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if cert_file:
        context.load_cert_chain(cert_file, key_file)
    return context
