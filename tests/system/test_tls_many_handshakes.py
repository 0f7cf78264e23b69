"""Ten thousand handshakes with identities that nobody has: nothing grows and nothing slows down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.handshakes import with_psk, with_random_identities
from bench.machine import resident_mib
from tests.system.tls_api import TlsApi
from tests.waiting import wait_for

REFUSED = 10_000
SAMPLE = 1_000
# 50 bytes for each refused handshake: less than its identity alone would take.
LEAK_MIB = 0.5


@pytest.fixture
def api(tmp_path: Path) -> Iterator[TlsApi]:
    """One with pre-shared keys."""
    with TlsApi(tmp_path) as made:
        yield made


def handshakes_a_second(api: TlsApi) -> float:
    """The best of three: what else runs on the machine only ever takes away."""
    shaker = with_psk(api.port, api.tls.psk_identity, api.tls.psk_hex, "PSK-AES256-GCM-SHA384")
    return max(shaker.run(SAMPLE) for _ in range(3))


def test_random_identities_leak_nothing_and_slow_nothing_down(api: TlsApi) -> None:
    handshakes_a_second(api)
    pid = api.kp.processes["api"].pid
    rate_before = handshakes_a_second(api)
    with_random_identities(api.port).run(REFUSED // 5)
    rates = []
    grown_mib = []

    def nothing_grows() -> bool:
        before = resident_mib(pid)
        with_random_identities(api.port).run(REFUSED)
        grown_mib.append(resident_mib(pid) - before)
        return grown_mib[-1] <= LEAK_MIB

    def as_fast_as_before() -> bool:
        rates.append(handshakes_a_second(api))
        return rates[-1] >= 0.95 * rate_before

    # What leaks grows each time; what the heap does for once, once.
    assert nothing_grows() or nothing_grows() or nothing_grows(), grown_mib
    # A machine that does something else for a moment is measured again.
    wait_for(as_fast_as_before, timeout_seconds=30)
    assert api.refusals() == len(grown_mib) * REFUSED + REFUSED // 5
