"""The command ``skipbus`` of the image: the services, and the probes ``ready`` and ``alive``.

A service runs in this process, so that as process 1 of a container it gets the signals. Only the requested service is
imported, because a probe runs every few seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module

_SERVICES = ("api", "syncer", "janitor")
_PROBES = ("ready", "alive")
_USAGE = """usage: skipbus api|syncer|janitor [--check-config | --version | --help]
       skipbus ready|alive

api, syncer and janitor run that service of a key provider until SIGTERM.
ready exits with 0 while the service of this container can do its work, alive while its event loop runs; else with 1,
and one line says why. Both ask the process itself, on 127.0.0.1 and SKIP_METRICS_PORT.
"""


def main() -> int:
    """Console script ``skipbus``. Exit codes are the service's or the probe's; 2 for a wrong argument."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in _SERVICES:
        # The services read their arguments as their own console scripts do.
        sys.argv = [f"skip-{word}", *sys.argv[2:]]
        return _main_of(f"skipbus.services.{word}.__main__")
    if word in _PROBES and len(sys.argv) == 2:
        return _probe(word)
    helped = word in ("--help", "-h")
    (sys.stdout if helped else sys.stderr).write(_USAGE)
    return 0 if helped else 2


def _main_of(module: str) -> int:
    entry: Callable[[], int] = import_module(module).main
    return entry()


def _probe(word: str) -> int:
    # Imported here, so that a service does not load it.
    from skipbus.services import probes  # noqa: PLC0415

    fault = probes.ready_fault(os.environ) if word == "ready" else probes.alive_fault(os.environ)
    sys.stdout.write(f"{fault or word}\n")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
