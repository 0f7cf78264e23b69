"""A TCP proxy in front of the store that cuts a connection at the moment of a commit.

``cut_before``: the statement with the COMMIT is thrown away, and the connection cut. ``cut_after``: the statement
is passed on, and the connection cut when the store has answered it: committed, and the client does not know.
A store that offers TLS seems not to, or the proxy would not see a COMMIT.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import socket
import struct
import threading
from typing import Literal

from sandbox.ports import LOOPBACK

Cut = Literal["cut_before", "cut_after"]
# As it ends a packet of several statements, or is one; "SET AUTOCOMMIT" is something else.
_COMMIT = re.compile(rb"[;\x03]COMMIT")
_CLIENT_SSL = 0x0800
_SO_ATTACH_FILTER = 26


class CuttingProxy:
    """Passes everything on, but what ``cut_next`` has set to be cut."""

    def __init__(self, port: int) -> None:
        self._store_port = port
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        self.cuts: list[Cut] = []
        self.cut_count = 0
        self._open: list[socket.socket] = []
        self._clients: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Ends all connections and the listener."""
        # A blocked accept() does not notice close(); it does notice shutdown().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for one in (self._listener, *self._open):
            one.close()

    def cut_next(self, *cuts: Cut) -> None:
        """What to do at the next commits, one after another."""
        self.cuts.extend(cuts)

    def forget(self) -> None:
        """As a firewall that has forgotten the connections: what comes on them vanishes, without a FIN or a RST."""
        for client in self._clients:
            drop_packets(client)
        self._clients.clear()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                store = socket.create_connection((LOOPBACK, self._store_port))
                self._open += [client, store]
                self._clients.append(client)
                threading.Thread(target=self._pass_on, args=(client, store), daemon=True).start()

    def _pass_on(self, client: socket.socket, store: socket.socket) -> None:
        muted = threading.Event()
        answers = threading.Thread(target=_pump, args=(store, client, muted), daemon=True)
        answers.start()
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 20):
                if self.cuts and _COMMIT.search(data):
                    muted.set()
                    if self.cuts.pop(0) == "cut_after":
                        store.sendall(data)
                        # The store ends the connection when it has done all that it was sent.
                        store.shutdown(socket.SHUT_WR)
                        answers.join()
                    self.cut_count += 1
                    break
                store.sendall(data)
        _end(client)
        _end(store)


def drop_packets(one: socket.socket) -> None:
    """Has the kernel discard every packet for this socket, unacknowledged: a BPF filter of one instruction, "ret 0"."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    one.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program)))


def _pump(source: socket.socket, sink: socket.socket, muted: threading.Event) -> None:
    with contextlib.suppress(OSError):
        sink.sendall(_without_tls(source.recv(1 << 16)))
        while data := source.recv(1 << 16):
            if not muted.is_set():
                sink.sendall(data)


def _without_tls(greeting: bytes) -> bytes:
    """The store's first packet with that capability taken out; an error packet stays as it is."""
    if greeting[4:5] != b"\x0a":
        return greeting
    # Header and protocol, the version up to its zero, thread id, half a salt and a zero stand before the capabilities.
    at = greeting.index(b"\0", 5) + 1 + 4 + 8 + 1
    capabilities = int.from_bytes(greeting[at : at + 2], "little") & ~_CLIENT_SSL
    return greeting[:at] + capabilities.to_bytes(2, "little") + greeting[at + 2 :]


def _end(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
