"""The suites of the store and the bus on the servers and the Python of the images (MySQL, MariaDB, RabbitMQ).

They run in a container with the working copy mounted, in one network namespace with the servers: they reach them on
loopback, as they reach private ones.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator

import pytest

from tests.containers.engine import docker, run
from tests.containers.stack import REPOSITORY
from tests.waiting import wait_for

DATABASES = ("mysql:9.7", "mariadb:11.8")
BROKER = "rabbitmq:4.0"
_PASSWORD = "of-a-server-for-tests-alone"
_MYSQL = f"mysql://suites:{_PASSWORD}@127.0.0.1:3306"
_RABBITMQ = f"amqp://test:{_PASSWORD}@127.0.0.1:5672/"
_ACCOUNT = f"""
CREATE USER 'suites'@'%' IDENTIFIED BY '{_PASSWORD}';
GRANT ALL PRIVILEGES ON *.* TO 'suites'@'%' WITH GRANT OPTION;
"""
# What asks the store alone, and what needs the broker (with a store beside it).
STORE = (
    "bus_link_store",
    "election",
    "epoch_keeper",
    "expiry",
    "indexes",
    "key_store",
    "log_metrics",
    "migrate",
    "pins",
    "pruning",
)
BUS = (
    "bus_link_bounds",
    "bus_link_syncer",
    "front",
    "https_link",
    "intake",
    "nudges",
    "peer_trust",
    "syncer_exchange",
    "syncer_refusals",
)
_SECONDS = 900


@pytest.fixture(params=DATABASES)
def database_server(request: pytest.FixtureRequest, engine: None) -> Iterator[str]:
    """The name of a container whose database answers."""
    name = f"skipbus-suites-{secrets.token_hex(4)}"
    image = str(request.param)
    kind = image.partition(":")[0]
    passwords = (f"--env=MYSQL_ROOT_PASSWORD={_PASSWORD}", f"--env=MARIADB_ROOT_PASSWORD={_PASSWORD}")
    # In memory: a suite makes a database for each test, and it is not the disk that is tested.
    memory = "--tmpfs=/var/lib/mysql"
    docker("run", "--detach", f"--name={name}", memory, *passwords, image, f"{kind}d", "--skip-name-resolve")
    try:
        # By TCP: the server that only prepares the data folder does not listen.
        admin = "mariadb-admin" if kind == "mariadb" else "mysqladmin"
        ping = f"{admin} ping --silent --host=127.0.0.1 && echo answers || true"
        wait_for(lambda: "answers" in docker("exec", name, "sh", "-c", ping), timeout_seconds=120, poll_seconds=1)
        # Who root is on loopback differs from one database to the other.
        docker("exec", "--interactive", name, kind, "-uroot", f"-p{_PASSWORD}", stdin=_ACCOUNT)
        yield name
    finally:
        docker("rm", "--force", "--volumes", name)


@pytest.fixture
def broker(database_server: str) -> Iterator[str]:
    """A broker beside the database."""
    name = f"{database_server}-rabbitmq"
    account = ("--env=RABBITMQ_DEFAULT_USER=test", f"--env=RABBITMQ_DEFAULT_PASS={_PASSWORD}")
    docker("run", "--detach", f"--name={name}", f"--network=container:{database_server}", *account, BROKER)
    try:
        listens = "</dev/tcp/127.0.0.1/5672 && echo answers || true"
        wait_for(lambda: "answers" in docker("exec", name, "bash", "-c", listens), timeout_seconds=120, poll_seconds=1)
        yield name
    finally:
        docker("rm", "--force", "--volumes", name)


def test_the_suite_of_the_store_passes_on_each_database_with_the_python_of_the_image(
    database_server: str, test_image: str
) -> None:
    _passes(test_image, f"container:{database_server}", *_files(STORE))


@pytest.mark.parametrize("database_server", DATABASES[:1], indirect=True)
def test_the_suite_of_the_bus_passes_on_its_broker_with_the_python_of_the_image(broker: str, test_image: str) -> None:
    _passes(test_image, f"container:{broker}", *_files(BUS))


def test_the_unit_tests_pass_with_the_python_of_the_image(test_image: str) -> None:
    _passes(test_image, "none", "tests/unit")


def test_every_suite_of_integration_is_run_here_or_needs_servers_of_its_own() -> None:
    found = {path.stem.removeprefix("test_") for path in (REPOSITORY / "tests" / "integration").glob("test_*.py")}
    own = {"leaderless_queue", "sandbox_servers", "sandbox_sites"}
    assert found == {*STORE, *BUS} | own


def _files(names: tuple[str, ...]) -> list[str]:
    return [f"tests/integration/test_{name}.py" for name in names]


def _passes(image: str, network: str, *tests: str) -> None:
    """Runs them, and shows the end of what they say where one fails. A run without tests is no pass."""
    servers = (f"--env=SKIPBUS_TEST_MYSQL={_MYSQL}", f"--env=SKIPBUS_TEST_RABBITMQ={_RABBITMQ}")
    mount = f"--volume={REPOSITORY}:/skipbus:ro"
    pytest_command = ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not stops_servers", *tests)
    command = ("docker", "run", "--rm", f"--network={network}", mount, *servers, image, *pytest_command)
    told = run(*command, timeout_seconds=_SECONDS)
    passed = re.search(r"(\d+) passed", told)
    assert passed is not None, told[-4000:]
    assert int(passed[1]) > 0
    assert "skipped" not in told
