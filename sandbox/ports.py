"""Free loopback ports for servers that may be restarted on the same port.

Ports are taken from below the kernel's ephemeral range, so that no outgoing connection can sit on the port
of a server that is down for a moment. A port is handed out once per process. Processes that take ports at the
same time, and must not take one that another has set aside for a server, say so by SKIPBUS_PORT_SHARE, as ``1/3``:
the second of three shares. It is meant for tests that run in several processes.
"""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

LOOPBACK = "127.0.0.1"

PORT_SHARE = "SKIPBUS_PORT_SHARE"
_LOWEST_PORT = 10240
_handed_out: set[int] = set()


def free_port() -> int:
    """A loopback TCP port that nothing listens on and that this process has not had before."""
    share, shares = _share()
    candidates = list(range(_LOWEST_PORT + share, _first_ephemeral_port(), shares))
    # Random order, so that two demos or test runs on one machine rarely look at the same port.
    random.shuffle(candidates)
    for port in candidates:
        if port not in _handed_out and is_free(port):
            _handed_out.add(port)
            return port
    raise OSError(f"no free TCP port between {_LOWEST_PORT} and {_first_ephemeral_port()}")


def is_free(port: int) -> bool:
    """Whether a server could listen on the port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def answers(port: int) -> bool:
    """Whether something listens on the port now."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((LOOPBACK, port)) == 0


def _share() -> tuple[int, int]:
    number, _, count = os.environ.get(PORT_SHARE, "0/1").partition("/")
    return int(number), int(count)


def _first_ephemeral_port() -> int:
    try:
        text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text()
    except OSError:
        return 32768
    return max(int(text.split()[0]), _LOWEST_PORT + 1000)
