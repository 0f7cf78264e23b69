"""The `skip-qkd` client from PyPI, as its users run it: a program of its own, in an environment of its own.

`scripts/setup clients` builds it. Its mode with client certificates exchanges keys here. Its mode with pre-shared
keys connects to no server in the world: it asks Python for a check of the host's name without a certificate, which
Python refuses before a byte is sent. That is stated here as a fact, and in docs/tls.md.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from sandbox.client import Key
from sandbox.key_provider import KeyProvider
from sandbox.ports import free_port
from sandbox.tls_files import TlsFiles
from tests.system.harness import ALICE, BOB, Lab, log_lines
from tests.system.tls_api import TlsApi
from tests.waiting import wait_for

PYTHON = Path(__file__).resolve().parents[2] / ".venv-clients" / "bin" / "python"
CALL = """
import json, sys
from skip_qkd import MTLSConfig, PSKConfig, SkipQKDClient

call = json.load(sys.stdin)
mtls = MTLSConfig(**call["mtls"]) if call["mtls"] else None
psk = PSKConfig(**call["psk"]) if call["psk"] else None
with SkipQKDClient(call["address"], call["server_id"], mtls_config=mtls, psk_config=psk) as client:
    print(json.dumps(getattr(client, call["method"])(*call["arguments"])))
"""


def skip_qkd(
    address: str,
    method: str,
    *arguments: object,
    mtls: dict[str, str] | None = None,
    psk: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """One call of the client's own method."""
    assert PYTHON.exists(), "there is no .venv-clients: run `scripts/setup clients`, as `make test` does"
    call = {"address": address, "server_id": "kp", "method": method, "arguments": arguments, "mtls": mtls, "psk": psk}
    return subprocess.run(
        [str(PYTHON), "-I", "-c", CALL], input=json.dumps(call), capture_output=True, text=True, timeout=30, check=False
    )


def mtls(tls: TlsFiles) -> dict[str, str]:
    """What its `MTLSConfig` takes."""
    return {
        "ca_file": str(tls.ca_file),
        "cert_file": str(tls.client_cert_file),
        "key_file": str(tls.client_key_file),
    }


def called(kp: KeyProvider, method: str, *arguments: object) -> dict[str, Any]:
    """What the client got with its certificate."""
    assert kp.tls is not None
    result = skip_qkd(kp.tls.address, method, *arguments, mtls=mtls(kp.tls))
    assert result.returncode == 0, result.stderr
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value


def test_skip_qkd_exchanges_a_key_by_client_certificates(lab: Lab) -> None:
    alice, bob = lab.add(ALICE, BOB), lab.add(BOB, ALICE)
    for kp in (alice, bob):
        kp.serve_tls(free_port())
        kp.start_all()
    for kp in (alice, bob):
        kp.wait_healthy(60)
    lab.wait_announced(alice, BOB)

    assert called(alice, "capabilities")["localSystemID"] == ALICE
    assert len(called(alice, "entropy", 512)["randomStr"]) == 128
    issued = called(alice, "request_key", BOB, 512)
    lab.handed_out.append(Key(ALICE, BOB, issued["keyId"], issued["key"]))
    assert len(bytes.fromhex(issued["key"])) == 64
    assert called(bob, "fetch_key_by_id", issued["keyId"], ALICE) == issued

    wait_for(lambda: bool(claims(bob)), timeout_seconds=5)
    seen = claims(bob)
    assert [(line["identity"], line["proof"]) for line in seen] == [("CN=client; DNS:client", "certificate")]


def claims(kp: KeyProvider) -> list[dict[str, Any]]:
    """The access lines of keys that were handed out."""
    return [line for line in log_lines(kp, "api") if line["event"] == "request" and "issued_as" in line]


def test_skip_qkd_with_a_certificate_of_another_authority_is_refused(tmp_path: Path) -> None:
    api = TlsApi(tmp_path)
    api.prepare()
    api.kp.run_skipctl("cert", "init", str(tmp_path / "foreign"))
    foreign = {"cert_file": f"{tmp_path}/foreign/client.pem", "key_file": f"{tmp_path}/foreign/client.key"}
    with api:
        result = skip_qkd(api.tls.address, "capabilities", mtls=mtls(api.tls) | foreign)
        assert result.returncode == 1
        assert "unknown ca" in result.stderr
        assert api.refusal(0)["reason"] == "bad client certificate: unable to get local issuer certificate"


def test_skip_qkd_s_mode_with_pre_shared_keys_gives_up_before_it_has_sent_a_byte(tmp_path: Path) -> None:
    api = TlsApi(tmp_path)
    api.prepare()
    key = {"identity": api.tls.psk_identity, "psk": api.tls.psk_hex}
    with api:
        result = skip_qkd(api.tls.address, "capabilities", psk=key)
        assert result.returncode == 1
        assert "Cannot set verify_mode to CERT_NONE when check_hostname is enabled" in result.stderr
        wait_for(lambda: api.refusals() == 1, timeout_seconds=5)
        assert api.refusal(0)["reason"] == "the client ended the connection during the handshake"
