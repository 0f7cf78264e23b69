"""`up -d` with a newer image, its migration included, while clients exchange keys."""

from __future__ import annotations

import http.client
import shutil
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from skipbus.shared.store.migrate import HEAD_REVISION
from skipbus_testkit.client import Client, client_context
from tests.containers.engine import docker
from tests.containers.stack import Stack

_MIGRATION = """
from alembic import op

revision = "{revision}"
down_revision = "{before}"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("CREATE TABLE IF NOT EXISTS of_{revision} (id INT PRIMARY KEY)")
    op.execute("ALTER TABLE processes ADD COLUMN of_{revision} INT NULL")
"""
_VERSIONS = "/opt/skipbus/lib/python3.13/site-packages/skipbus/shared/store/migrations/versions/"


@dataclass(frozen=True)
class Release:
    """One after this: one more migration than the release before it."""

    image: str
    revision: str


@pytest.fixture(scope="module")
def next_releases(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Release]]:
    """For each way of upgrading the release that it brings, the second one after the first."""
    releases: dict[str, Release] = {}
    before = Release(image, HEAD_REVISION)
    for number, way in enumerate(STEPS, 1):
        before = releases[way] = _release_after(before, number, f"{image}-next-{number}", tmp_path_factory)
    yield releases
    docker("image", "rm", "--force", *(release.image for release in releases.values()))


def _release_after(before: Release, number: int, image: str, folders: pytest.TempPathFactory) -> Release:
    made, context = Release(image, f"test_next_{number}"), folders.mktemp("next")
    file = f"999{number}_next.py"
    (context / file).write_text(_MIGRATION.format(revision=made.revision, before=before.revision))
    (context / "Dockerfile").write_text(f"FROM {before.image}\nCOPY --chmod=644 {file} {_VERSIONS}\n")
    docker("build", "--quiet", "--tag", image, str(context))
    return made


@dataclass
class Exchanges:
    """Encryptors at both ends that exchange keys all the time, a connection for each request, and never try again."""

    alice: Client
    bob: Client
    faults: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            begun = time.monotonic()
            try:
                fault = self._exchange()
            except (OSError, ValueError, KeyError, ssl.SSLError, http.client.HTTPException) as error:
                fault = repr(error)
            if fault:
                self.faults.append(f"after {time.monotonic() - begun:.1f} s: {fault}")
            self.seconds.append(time.monotonic() - begun)
            time.sleep(0.02)

    def figures(self) -> str:
        """How many there were, how many failed, and how long the longest took."""
        return f"{len(self.seconds)} exchanges, {len(self.faults)} failed, the longest {max(self.seconds):.1f} s"

    def _exchange(self) -> str | None:
        issued = self.alice.get("key", remoteSystemID="KP_Bob")
        if issued.status != 200:
            return f"GET /key {issued.status} {issued.error}"
        retrieved = self.bob.get("key", issued.body["keyId"], remoteSystemID="KP_Alice")
        return None if retrieved.body == issued.body else f"GET /key/keyId {retrieved.status} {retrieved.error}"


# Not with `--no-deps`: Compose then takes the services for changed ones, and the last step would stop them again.
STEPS = {
    "at once": (("up", "--detach", "--wait"),),
    "in turn": (("up", "--detach", "--wait", "alice-api", "bob-api"), ("up", "--detach", "--wait")),
}
# How long the shipped haproxy.cfg lets a connection wait for an api.
HOLD_SECONDS = 60.0
# Of one exchange. At once, Compose stops both apis before it starts one; in turn, one of them always serves.
LONGEST_SECONDS = {"at once": HOLD_SECONDS, "in turn": 5.0}


@pytest.fixture(scope="module")
def two_apis(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Both key providers with two apis and a front each, running; an upgrade leaves them on its release."""
    stack = Stack(tmp_path_factory.mktemp("two_apis"), image)
    stack.init("--kp", "KP_Alice", "--kp", "KP_Bob")
    shutil.copy(stack.folder / "two-apis.yaml", stack.folder / "compose.override.yaml")
    try:
        stack.up()
        stack.smoke()
        yield stack
    finally:
        stack.down()


@contextmanager
def exchanging(stack: Stack) -> Iterator[Exchanges]:
    """Encryptors exchange keys, two at a time, from two seconds before the block to two seconds after it."""
    exchanges, stop = Exchanges(_client(stack, "alice"), _client(stack, "bob")), threading.Event()
    clients = [threading.Thread(target=exchanges.run, args=(stop,)) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        time.sleep(2)
        yield exchanges
        time.sleep(2)
    finally:
        stop.set()
        for client in clients:
            client.join(4 * HOLD_SECONDS)


@pytest.mark.timed
@pytest.mark.parametrize("way", STEPS)
def test_no_exchange_fails_while_up_brings_a_newer_image_and_its_migration(
    two_apis: Stack, image: str, next_releases: dict[str, Release], way: str
) -> None:
    following = next_releases[way]
    two_apis.environ["SKIPBUS_IMAGE"] = following.image
    with exchanging(two_apis) as exchanges:
        for step in STEPS[way]:
            two_apis.compose(*step)
    assert exchanges.faults == [], exchanges.figures()
    assert max(exchanges.seconds) < LONGEST_SECONDS[way], exchanges.figures()
    assert following.revision in two_apis.compose("logs", "provision")
    assert {two_apis.image_of(service) for service in ("alice-api", "alice-api-b", "bob-api-b")} == {following.image}
    two_apis.smoke()


def _client(stack: Stack, name: str) -> Client:
    files = stack.folder / "clients" / name
    context = client_context(str(files / "ca.pem"), str(files / "client.pem"), str(files / "client.key"))
    return Client(
        f"https://127.0.0.1:{stack.environ[f'{name.upper()}_PORT']}", context, timeout_seconds=2 * HOLD_SECONDS
    )
