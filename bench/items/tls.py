"""Item 7: TLS in the process against stunnel before the plain port, and whether handshakes leave anything.

The target is for one api process, which does HTTP and TLS on one core while stunnel has another. Operators run as many
workers as there are cores, so kept connections are measured with two of them on both sides as well, without a target.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from bench import wrk
from bench.handshakes import Shaker, with_certificate, with_psk
from bench.machine import resident_mib
from bench.plan import Plan
from bench.progress import tell
from bench.report import Figure, Finding, Line, Target
from bench.stage import Stage
from sandbox.key_provider import KeyProvider
from sandbox.processes import SandboxError
from sandbox.stunnel import Stunnel

_LIMIT_RATIO = 1.05
_WORKERS = 2


def measure(stage: Stage, plan: Plan) -> Finding:
    """A second api of KP_Alice serves TLS, and its plain port is stunnel's; clients need no certificate here."""
    with _both(stage, workers=1) as (api, stunnel):
        native, through = _kept(api, stunnel, plan)
        kept = Line(
            7,
            Figure("GET /capabilities, TLS kept, in the process", native, "/s"),
            Figure("through stunnel", through, "/s"),
            Target("at least", 1.0),
        )
        others = [*_handshakes(api, stunnel, plan), _memory(api, plan)]
    with _both(stage, workers=_WORKERS) as (api, stunnel):
        native, through = _kept(api, stunnel, plan)
        kept_by_workers = Line(
            7,
            Figure(f"GET /capabilities, TLS kept, {_WORKERS} api workers", native, "/s"),
            Figure(f"through stunnel, {_WORKERS} api workers", through, "/s"),
        )
    note = "item 7: DHE uses ffdhe3072 in the process, and stunnel's own group of 2048 bits there"
    return Finding([kept, kept_by_workers, *others], [note])


@contextmanager
def _both(stage: Stage, workers: int) -> Iterator[tuple[KeyProvider, Stunnel]]:
    """An api with so many workers that serves TLS, and stunnel in front of its plain port."""
    api = stage.tls_api(workers)
    root = stage.root / f"stunnel-{workers}"
    root.mkdir()
    try:
        with Stunnel(api, root, server="ecdsa", client_certificates=False) as stunnel:
            yield api, stunnel
    finally:
        api.stop_all()


def _kept(api: KeyProvider, stunnel: Stunnel, plan: Plan) -> tuple[list[float], list[float]]:
    native: list[float] = []
    through: list[float] = []
    for _ in range(plan.rounds):
        native.append(wrk.rate(f"{_tls_url(api)}/capabilities", plan.step_seconds))
        through.append(wrk.rate(f"https://127.0.0.1:{stunnel.port}/capabilities", plan.step_seconds))
    return native, through


def _handshakes(api: KeyProvider, stunnel: Stunnel, plan: Plan) -> list[Line]:
    native, through = _shakers(api, _tls_port(api)), _shakers(api, stunnel.port)
    lines = []
    for name in native:
        rates: tuple[list[float], list[float]] = ([], [])
        for _ in range(plan.rounds):
            for shaker, samples in zip((native[name], through[name]), rates, strict=True):
                samples.append(shaker.rate(plan.step_seconds))
        lines.append(
            Line(7, Figure(f"handshakes, {name}, in the process", rates[0], "/s"), Figure("stunnel", rates[1], "/s"))
        )
    return lines


def _memory(api: KeyProvider, plan: Plan) -> Line:
    half = plan.handshakes // 2
    shaker = _shakers(api, _tls_port(api))["PSK"]
    tell(f"  {plan.handshakes:,} handshakes")
    pid = api.processes["api"].pid
    shaker.run(half)
    at_half = resident_mib(pid)
    shaker.run(half)
    return Line(
        7,
        Figure(f"api process after {plan.handshakes:,} handshakes", [resident_mib(pid)], "MiB"),
        Figure("after half of them", [at_half], "MiB"),
        Target("at most", _LIMIT_RATIO),
    )


def _shakers(api: KeyProvider, port: int) -> dict[str, Shaker]:
    if api.tls is None:
        raise SandboxError("the api serves no TLS")
    identity, key_hex = api.tls.psk_identity, api.tls.psk_hex
    return {
        "PSK": with_psk(port, identity, key_hex, "PSK-AES256-GCM-SHA384"),
        "DHE-PSK": with_psk(port, identity, key_hex, "DHE-PSK-AES256-GCM-SHA384"),
        "certificate, TLS 1.2": with_certificate(port, ssl.TLSVersion.TLSv1_2),
        "certificate, TLS 1.3": with_certificate(port, ssl.TLSVersion.TLSv1_3),
    }


def _tls_url(api: KeyProvider) -> str:
    return f"https://127.0.0.1:{_tls_port(api)}"


def _tls_port(api: KeyProvider) -> int:
    if api.tls is None:
        raise SandboxError("the api serves no TLS")
    return api.tls.port
