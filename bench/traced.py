"""Runs a module as ``python -m`` would, and notes which files of this repository's services its functions come from.

``python -m bench.traced MODULE``, started by ``bench.modules_per_flow`` alone. It answers on the Unix socket that
``SKIPBUS_BENCH_TRACE_SOCKET`` names: each line that it reads is answered with the files that were executed since the
line before, in JSON.
"""

from __future__ import annotations

import json
import os
import runpy
import socketserver
import sys
import threading
from pathlib import Path
from types import FrameType

import skipbus

SOCKET_VARIABLE = "SKIPBUS_BENCH_TRACE_SOCKET"
_OURS = str(Path(skipbus.__file__).parent)
_executed: set[str] = set()


def _note(frame: FrameType, event: str, _argument: object) -> None:
    if event == "call":
        _executed.add(frame.f_code.co_filename)


class _Questions(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for _ in self.rfile:
            files = sorted(name for name in tuple(_executed) if name.startswith(_OURS))
            _executed.clear()
            self.wfile.write(json.dumps([os.path.relpath(name, _OURS) for name in files]).encode() + b"\n")


def main() -> None:
    # Started before the profiler, which each thread has for itself: the answering is not noted.
    server = socketserver.ThreadingUnixStreamServer(os.environ.pop(SOCKET_VARIABLE), _Questions)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    threading.setprofile(_note)
    sys.setprofile(_note)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
