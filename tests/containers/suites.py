"""The suites of tests/integration on servers and the Python of the images: what there is, and how one is run.

What asks a store runs on both databases (``test_suites_mysql``, ``test_suites_mariadb``), with the same broker.
A suite runs in a container with the working copy mounted, in one network namespace with its servers: it reaches them on
loopback, as it reaches private ones. A run that fails shows its end, and one that ran no test is no pass.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from tests.containers.engine import docker, run
from tests.containers.stack import REPOSITORY
from tests.waiting import wait_for

BROKER = "rabbitmq:4.0"
# What asks the store alone, and what needs the broker (with a store beside it).
STORE = (
    "apply",
    "bus_link_store",
    "election",
    "epoch_keeper",
    "expiry",
    "indexes",
    "key_store",
    "migrate",
    "outbox",
    "pins",
    "polling",
    "pruning",
    "regular_tasks",
    "stock_queries",
)
BUS = (
    "bus_link_bounds",
    "bus_link_syncer",
    "https_link",
    "peer_trust",
    "receive",
    "syncer_exchange",
    "syncer_refusals",
)
# What asks no store, and so runs once, beside MariaDB.
NO_STORE = ("broker_connection", "log_metrics", "notifications")
_PASSWORD = "of-a-server-for-tests-alone"
_MYSQL = f"mysql://suites:{_PASSWORD}@127.0.0.1:3306"
_RABBITMQ = f"amqp://test:{_PASSWORD}@127.0.0.1:5672/"
_ACCOUNT = f"""
CREATE USER 'suites'@'%' IDENTIFIED BY '{_PASSWORD}';
GRANT ALL PRIVILEGES ON *.* TO 'suites'@'%' WITH GRANT OPTION;
"""
_SECONDS = 900


@contextmanager
def servers(image: str) -> Iterator[str]:
    """A database of this image and a broker beside it, both answering; the container whose network both are in."""
    name = f"skipbus-suites-{secrets.token_hex(4)}"
    try:
        _start_database(name, image)
        _start_broker(f"{name}-rabbitmq", name)
        _await_database(name, image.partition(":")[0])
        _await_broker(f"{name}-rabbitmq")
        yield name
    finally:
        docker("rm", "--force", "--volumes", f"{name}-rabbitmq", name)


def passes(test_image: str, network: str, *tests: str) -> None:
    """Runs these tests, and shows the end of what they say where one fails."""
    environ = (f"--env=SKIPBUS_TEST_MYSQL={_MYSQL}", f"--env=SKIPBUS_TEST_RABBITMQ={_RABBITMQ}")
    name = f"skipbus-suites-{secrets.token_hex(4)}"
    options = ("--rm", "--init", f"--name={name}", f"--network={network}", f"--volume={REPOSITORY}:/skipbus:ro")
    pytest_command = ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not stops_servers", *tests)
    try:
        output = run("docker", "run", *options, *environ, test_image, *pytest_command, timeout_seconds=_SECONDS)
    except BaseException:
        # A client that was ended, for its time or by Ctrl-C, leaves its container running.
        docker("rm", "--force", name)
        raise
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None, output[-4000:]
    assert int(passed[1]) > 0
    assert "skipped" not in output


def files(names: tuple[str, ...]) -> list[str]:
    return [f"tests/integration/test_{name}.py" for name in names]


def _start_database(name: str, image: str) -> None:
    program = f"{image.partition(':')[0]}d"
    passwords = (f"--env=MYSQL_ROOT_PASSWORD={_PASSWORD}", f"--env=MARIADB_ROOT_PASSWORD={_PASSWORD}")
    # In memory: a suite makes a database for each test, and it is not the disk that is tested.
    memory = "--tmpfs=/var/lib/mysql"
    docker("run", "--detach", f"--name={name}", memory, *passwords, image, program, "--skip-name-resolve")


def _start_broker(name: str, network_of: str) -> None:
    account = ("--env=RABBITMQ_DEFAULT_USER=test", f"--env=RABBITMQ_DEFAULT_PASS={_PASSWORD}")
    docker("run", "--detach", f"--name={name}", f"--network=container:{network_of}", *account, BROKER)


def _await_database(name: str, kind: str) -> None:
    # By TCP: the server that only prepares the data folder does not listen.
    admin = "mariadb-admin" if kind == "mariadb" else "mysqladmin"
    ping = f"{admin} ping --silent --host=127.0.0.1 && echo answers || true"
    wait_for(lambda: "answers" in docker("exec", name, "sh", "-c", ping), timeout_seconds=120, poll_seconds=1)
    # Who root is on loopback differs from one database to the other.
    docker("exec", "--interactive", name, kind, "-uroot", f"-p{_PASSWORD}", stdin=_ACCOUNT)


def _await_broker(name: str) -> None:
    listens = "</dev/tcp/127.0.0.1/5672 && echo answers || true"
    wait_for(lambda: "answers" in docker("exec", name, "bash", "-c", listens), timeout_seconds=120, poll_seconds=1)
