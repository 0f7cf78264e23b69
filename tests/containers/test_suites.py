"""The unit tests on the Python of the image, and that no suite of integration is forgotten in a container.

The suites of the store and of the bus are in files of their own, one for each database (``test_suites_mysql``,
``test_suites_mariadb``): two processes then run them at the same time.
"""

from __future__ import annotations

from tests.containers.stack import REPOSITORY
from tests.containers.suites import BUS, NO_STORE, STORE, passes


def test_the_unit_tests_pass_with_the_python_of_the_image(test_image: str) -> None:
    passes(test_image, "none", "tests/unit")


def test_every_suite_of_integration_is_run_here_or_needs_servers_of_its_own() -> None:
    found = {path.stem.removeprefix("test_") for path in (REPOSITORY / "tests" / "integration").glob("test_*.py")}
    own = {
        "distribution",
        "front",
        "galera",
        "leaderless_queue",
        "modules_per_flow",
        "sandbox_servers",
        "sandbox_sites",
    }
    # A container may not be allowed to drop packets.
    own.add("servers")
    assert found == {*STORE, *BUS, *NO_STORE} | own
