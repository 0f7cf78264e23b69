"""The front process: one published port, before api processes that come and go with their containers.

It passes octets on and reads none of them: TLS is between encryptor and api, so it has no key, no certificate and no
account, and a break-in to it gets what anybody on the wire has. What it adds is patience: it holds a connection while
no api listens, and gives it to another one when an api goes away before it has said anything.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import sys
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Gauge

from skipbus.services.front.passing import Backends, Passage
from skipbus.shared.config import project_version
from skipbus.shared.lifecycle import DRAIN_SECONDS, every, run_service
from skipbus.shared.metrics import serve_metrics

_TICK_SECONDS = 1.0
_BACKLOG = 4096


def main() -> int:
    """``skipbus front``. Exit code 0 after a signal, 1 after a failure, 2 for a bad argument."""
    arguments = _parser().parse_args()
    host, port = arguments.listen
    metrics_port = int(os.environ.get("SKIP_METRICS_PORT", "0"))
    return run_service(functools.partial(serve, host, port, arguments.backends, metrics_port))


async def serve(
    host: str, port: int, backends: Sequence[tuple[str, int]], metrics_port: int, stop: asyncio.Event
) -> None:
    """Passes connections on until ``stop``, and then for as long as those need that are there."""
    registry = CollectorRegistry()
    open_connections = Gauge("skipbus_front_connections", "Connections that are passed on now.", registry=registry)
    serve_metrics(metrics_port, registry)
    passages: set[asyncio.Task[None]] = set()
    chosen = Backends(backends)

    def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passage = asyncio.create_task(Passage(chosen, reader, writer).run(), name="passage")
        passages.add(passage)
        passage.add_done_callback(passages.discard)

    async def tick() -> None:
        open_connections.set(len(passages))

    server = await asyncio.start_server(take, host, port, backlog=_BACKLOG)
    try:
        await every(stop, _TICK_SECONDS, "front", tick)
    finally:
        server.close()
        if passages:
            await asyncio.wait(passages, timeout=DRAIN_SECONDS - 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="skipbus front", description="One port before several api processes.")
    parser.add_argument("backends", nargs="+", type=_address, metavar="HOST:PORT", help="where an api serves TLS")
    parser.add_argument("--listen", type=_address, default=("0.0.0.0", 8443), help="default 0.0.0.0:8443")  # noqa: S104
    parser.add_argument("--version", action="version", version=f"skipbus front {project_version()}")
    return parser


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


if __name__ == "__main__":
    sys.exit(main())
