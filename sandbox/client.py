"""One request to a key provider's plain port, the key that it answers with, and a metric of one of its processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.request import urlopen

from sandbox.ports import LOOPBACK
from skipbus_testkit.client import Answer, Client


@dataclass(frozen=True)
class Key:
    """One key as `GET /key` answered it."""

    source: str
    target: str
    key_id: str
    key: str = field(repr=False)


def get(url: str, *path: str, timeout_seconds: float = 10, **query: str) -> Answer:
    """`GET url/path…?query`. Raises OSError when nobody answers."""
    return Client(url, timeout_seconds=timeout_seconds).get(*path, **query)


def metric(port: int | str, name: str, **labels: str) -> list[float]:
    """The values of all series of one metric that have these labels. Raises OSError when nobody answers."""
    with urlopen(f"http://{LOOPBACK}:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    found = [
        line for line in lines if line.startswith((f"{name} ", f"{name}{{")) and all(part in line for part in wanted)
    ]
    return [float(line.rpartition(" ")[2]) for line in found]
