"""Two joined sites on one host, made and started as the README tells people to."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from sandbox.ports import free_port
from skipbus_testkit.client import Answer, Client, client_context
from tests.containers.engine import docker
from tests.containers.stack import Stack, skipctl_site, smoke
from tests.waiting import wait_for


class Site(Stack):
    """One site of the two. Its `.env` says everything, as with an operator."""

    def __init__(self, parent: Path, image: str, place: str, peer: str, link: str) -> None:
        super().__init__(parent, image)
        self.folder = parent / place
        self.system_id, self.peer_id = f"KP_{place}", f"KP_{peer}"
        self.port = free_port()
        self.environ = {**os.environ, "COMPOSE_PROJECT_NAME": self.project}
        self._settings = {
            "SKIPBUS_IMAGE": image,
            "ADDRESS": "127.0.0.1",
            "SITE_PORT": str(self.port),
            "COMPOSE_PROJECT_NAME": self.project,
            "LINK_NETWORK": link,
        }

    def edit_environment(self) -> None:
        """Values of this test run in the place of those that `site init` wrote, or beside them."""
        file = self.folder / ".env"
        lines = [line for line in file.read_text().splitlines() if line.partition("=")[0] not in self._settings]
        file.write_text("\n".join([*lines, *(f"{name}={value}" for name, value in self._settings.items())]) + "\n")

    def client(self) -> Client:
        files = self.folder / "clients" / "site"
        context = client_context(str(files / "ca.pem"), str(files / "client.pem"), str(files / "client.key"))
        return Client(f"https://127.0.0.1:{self.port}", context)

    def issue(self, **query: str) -> Answer:
        """`GET /key` for the other site."""
        return self.client().get("key", remoteSystemID=self.peer_id, **query)

    def stock(self) -> dict[str, Any]:
        """What `/status/sync` says of the stock at the other site."""
        return dict(self.client().get("status", "sync").body["peers"][self.peer_id]["stock"])


class TwoSites:
    """Both, and the network between them."""

    def __init__(self, parent: Path, image: str) -> None:
        self._parent, self._image = parent, image
        self.link = f"skipbus-test-link-{secrets.token_hex(4)}"
        self.paris = Site(parent, image, "Paris", "Oslo", self.link)
        self.oslo = Site(parent, image, "Oslo", "Paris", self.link)
        self.both = (self.paris, self.oslo)

    def init(self) -> None:
        """`skipctl site pair`"""
        skipctl_site(self._image, self._parent, "pair", *(f"{site.folder.name}={site.system_id}" for site in self.both))
        for site in self.both:
            site.edit_environment()

    def up(self) -> None:
        """Both healthy. The first one makes the network."""
        self.paris.compose("up", "--detach")
        self.oslo.up()
        self.paris.up()

    def smoke(self) -> str:
        return smoke(os.environ, *(site.folder for site in self.both))

    def down(self) -> None:
        """Ends everything; nothing may be left."""
        try:
            self.oslo.down()
        finally:
            self.paris.down()
        left = docker("network", "ls", "--quiet", f"--filter=name={self.link}")
        assert left == "", "the network between the sites was left"

    def cut(self) -> None:
        """No octet passes between the sites."""
        docker("network", "disconnect", self.link, self.oslo.container("rabbitmq"))

    def heal(self) -> None:
        alias = "--alias=skipbus-oslo"
        docker("network", "connect", alias, self.link, self.oslo.container("rabbitmq"))

    def wait_stock_full(self, timeout_seconds: float = 90) -> None:
        for site in self.both:
            wait_for(lambda: _is_full(site.stock()), timeout_seconds=timeout_seconds, poll_seconds=0.5)  # noqa: B023 -- called at once


def _is_full(stock: dict[str, Any]) -> bool:
    return bool(stock["placed"] >= stock["configured"] > 0)
