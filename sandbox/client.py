"""A plain HTTP client for one request to a key provider, as curl would send it."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode, urlsplit


@dataclass(frozen=True)
class Answer:
    """Status and JSON body of one answer. The body may hold a key, so it stays out of the repr."""

    status: int
    body: dict[str, Any] = field(repr=False)

    @property
    def error(self) -> str:
        return str(self.body.get("error", ""))


def get(url: str, *path: str, timeout_seconds: float = 10, **query: str) -> Answer:
    """`GET url/path…?query`. Raises OSError when nobody answers, ValueError when the answer is not JSON."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port or 80, timeout=timeout_seconds)
    try:
        connection.request("GET", target(*path, **query))
        response = connection.getresponse()
        return Answer(response.status, json.loads(response.read()))
    except http.client.HTTPException as error:
        raise OSError(f"broken answer: {error!r}") from error
    finally:
        connection.close()


def target(*path: str, **query: str) -> str:
    """The request target, with everything escaped that has to be."""
    text = "/" + "/".join(quote(part, safe="") for part in path)
    return f"{text}?{urlencode(query)}" if query else text
