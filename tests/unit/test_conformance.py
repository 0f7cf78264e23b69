"""The conformance check tells key providers that keep the draft from those that do not: small ones, made to lie."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from skipbus_testkit import conformance

# What two of these key providers share; `flaw` names what both do wrong.
Keys = dict[str, dict[str, Any]]


class Foreign(ThreadingHTTPServer):
    """A SKIP key provider without TLS, as somebody else could have written it."""

    daemon_threads = True

    def __init__(self, system_id: str, other_id: str, keys: Keys, flaw: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.system_id, self.other_id, self.keys, self.flaw = system_id, other_id, keys, flaw

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Foreign

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        parts = address.path.strip("/").split("/")
        status, body = self._answer(parts, query)
        self._send(status, body)

    def do_POST(self) -> None:
        self._send(200 if self.server.flaw == "any method" else 405, {"error": "GET only"})

    do_PUT = do_DELETE = do_POST  # noqa: N815 -- http.server calls them by these names

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class's name
        pass

    def _answer(self, parts: list[str], query: dict[str, str]) -> tuple[int, dict[str, Any]]:
        flaw = self.server.flaw
        match parts:
            case ["capabilities"]:
                remotes = [] if flaw == "no remotes" else [self.server.other_id[:-1] + "*"]
                local = self.server.system_id
                body = {"key": True, "algorithm": "none", "localSystemID": local, "remoteSystemID": remotes}
                return 200, body | {"entropy": "yes" if flaw == "entropy as text" else True}
            case ["key"]:
                size = 256 if flaw == "one size" else int(query.get("size", "256"))
                key = {"keyId": secrets.token_hex(16), "key": secrets.token_hex(size // 8)}
                self.server.keys[key["keyId"]] = {
                    "target": query["remoteSystemID"],
                    "source": self.server.system_id,
                    **key,
                }
                return 200, key
            case ["key", key_id]:
                return self._retrieve(key_id, query)
            case ["entropy"]:
                bits = int(query.get("minentropy", "256"))
                sample = "00" * (bits // 8) if flaw == "fixed entropy" else secrets.token_hex(bits // 8)
                return 200, {"randomStr": sample, "minentropy": bits}
        return 404, {"error": "no such path"}

    def _retrieve(self, key_id: str, query: dict[str, str]) -> tuple[int, dict[str, Any]]:
        flaw, found = self.server.flaw, self.server.keys.get(key_id)
        if found is None or (found["source"] != query["remoteSystemID"] and flaw != "any remote"):
            own = found is not None and found["source"] == self.server.system_id
            if not (own and flaw == "kept at the source"):
                return (404 if flaw == "404 for keys" else 400), {"error": "no such key"}
        assert found is not None
        if flaw != "not zeroized":
            del self.server.keys[key_id]
        key = secrets.token_hex(32) if flaw == "another key" else found["key"]
        return 200, {"keyId": key_id, "key": key}

    def _send(self, status: int, body: dict[str, Any]) -> None:
        octets = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(octets)))
        self.end_headers()
        self.wfile.write(octets)


@pytest.fixture
def lines(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    """What the check prints of two key providers with the flaw of the parameter."""
    keys: Keys = {}
    servers = [Foreign("KP_A", "KP_B", keys, request.param), Foreign("KP_B", "KP_A", keys, request.param)]
    for server in servers:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        code = conformance.main([server.url for server in servers])
        yield [*capsys.readouterr().out.splitlines(), f"code {code}"]
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def wrong(lines: list[str]) -> list[str]:
    """The sections of the clauses that do not hold, but for TLS, which none of these has."""
    found = [line for line in lines if line.startswith(("FAIL", "warn"))]
    return [" ".join(line.split()[:3]) for line in found if "over TLS" not in line]


@pytest.mark.parametrize("lines", ["none"], indirect=True)
def test_a_key_provider_without_tls_fails_for_that_alone(lines: list[str]) -> None:
    assert wrong(lines) == []
    assert [line.split()[0] for line in lines if "over TLS" in line] == ["FAIL"]
    assert lines[-1] == "code 1"


@pytest.mark.parametrize(
    ("lines", "reported"),
    [
        ("not zeroized", ["FAIL MUST 4.2.2"]),
        ("another key", ["FAIL MUST 2", "FAIL MUST 4.2"]),
        ("one size", ["FAIL MUST 4.2", "FAIL MUST 4.2"]),
        ("any remote", ["FAIL MUST 4.2", "FAIL MUST 2"]),
        ("kept at the source", ["FAIL MUST 2"]),
        ("404 for keys", ["warn SHOULD 4.2,", "warn SHOULD 4.2,"]),
        ("any method", ["warn SHOULD 4,"]),
        ("no remotes", ["FAIL MUST 4.1.2", "FAIL MUST 4.1.2"]),
        ("entropy as text", ["FAIL MUST 4.1"]),
        ("fixed entropy", ["FAIL MUST 4.3"]),
    ],
    indirect=["lines"],
)
def test_each_flaw_is_reported_by_its_clause(lines: list[str], reported: list[str]) -> None:
    assert sorted(wrong(lines)) == sorted(reported)


def test_a_key_provider_that_is_not_there_ends_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance.main(["http://127.0.0.1:9", "http://127.0.0.1:9"]) == 2
    assert "Connection refused" in capsys.readouterr().err
