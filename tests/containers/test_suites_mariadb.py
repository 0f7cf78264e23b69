"""The whole suites of the store and of the bus on MariaDB 11.8, RabbitMQ 4.0 and the Python of the image."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.containers.suites import BUS, NO_STORE, STORE, files, passes, servers


@pytest.fixture(scope="module")
def network(engine: None) -> Iterator[str]:
    """Both servers' network, for both suites: each test makes a database and a key provider of its own."""
    with servers("mariadb:11.8") as name:
        yield f"container:{name}"


def test_the_suite_of_the_store_passes_on_mariadb(network: str, test_image: str) -> None:
    passes(test_image, network, *files(STORE))


def test_the_suite_of_the_bus_passes_on_mariadb(network: str, test_image: str) -> None:
    passes(test_image, network, *files(BUS))


def test_what_asks_no_store_passes(network: str, test_image: str) -> None:
    passes(test_image, network, *files(NO_STORE))
