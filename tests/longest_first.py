"""Which files of tests take longest, and that they begin first.

Tests run in several processes, a file in one of them (``--dist loadfile``): a long file that begins last leaves the
other processes idle. xdist's own order goes by the number of tests in a file, which says nothing of its length, so it
is switched off (``--no-loadscope-reorder``). A file that is not named here comes after these; nothing else depends on
the list, and it is right as long as the long ones are near its top (``--durations=40`` tells).
"""

from __future__ import annotations

import pytest

LONGEST_FIRST = (
    # make test: a minute and more.
    "tests/system/test_sites_meshes.py",
    "tests/system/test_guarantees.py",
    "tests/integration/test_galera.py",
    "tests/system/test_tls_files.py",
    "tests/system/test_sites_demo.py",
    "tests/integration/test_leaderless_queue.py",
    "tests/system/test_bus_link_api.py",
    "tests/system/test_sites.py",
    "tests/system/test_faults.py",
    "tests/integration/test_bus_link_bounds.py",
    "tests/integration/test_syncer_exchange.py",
    "tests/system/test_status.py",
    "tests/system/test_standby.py",
    "tests/integration/test_indexes.py",
    "tests/system/test_tls_many_handshakes.py",
    "tests/system/test_tls_attacks.py",
    "tests/integration/test_sandbox_sites.py",
    "tests/system/test_attacks_envelopes.py",
    "tests/system/test_tls_skip_qkd.py",
    "tests/integration/test_log_metrics.py",
    "tests/system/test_hostile_clients.py",
    # make test-containers.
    "tests/containers/test_suites_mysql.py",
    "tests/containers/test_suites_mariadb.py",
    "tests/containers/test_tls.py",
    "tests/containers/test_two_sites.py",
    "tests/containers/test_shared_store.py",
    "tests/containers/test_site.py",
    "tests/containers/test_suites.py",
    "tests/containers/test_image.py",
    "tests/containers/test_testkit.py",
    "tests/containers/test_stunnel.py",
)
_PLACES = {name: place for place, name in enumerate(LONGEST_FIRST)}


def longest_first(items: list[pytest.Item]) -> None:
    """Sorts them by their files; within a file, and among files that are not named, the order stays."""
    items.sort(key=lambda item: _PLACES.get(item.nodeid.partition("::")[0], len(_PLACES)))
