"""What the private servers share: own data folder, own ports, loopback only, a child process that cannot outlive us.

Nothing of the machine's own servers is read or changed, and a stopped server leaves no process behind. How long a start
may take, and what is reported when it fails, is here; the supervisor restarts a server that died.
"""

from __future__ import annotations

from pathlib import Path

from sandbox.processes import Child, SandboxError, Startable

START_SECONDS = 60.0
STOP_SECONDS = 30.0


class Server(Startable):
    """A child process that is started, waited for and ended."""

    name: str
    port: int

    def __init__(self, root: Path, log: Path | None) -> None:
        self.root = root
        self.log = log or root / "server.log"
        self.pid_file = root / "server.pid"
        self._child: Child | None = None
        root.mkdir(parents=True, exist_ok=True, mode=0o700)

    @property
    def pid(self) -> int:
        """The server's process id. Raises SandboxError when it was never started or was stopped."""
        if self._child is None:
            raise SandboxError(f"{self.name} is not started")
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.running

    @property
    def adopted_pid(self) -> int | None:
        """Who serves in our place, by the pid file: someone may have started the server by hand."""
        try:
            return int(self.pid_file.read_text())
        except (OSError, ValueError):
            return None

    def start(self) -> None:
        """Start and wait until it serves. Does nothing when it runs. Raises SandboxError."""
        if not self.running:
            self.launch()
        self.wait_ready()

    def launch(self) -> None:
        """Start without waiting."""
        raise NotImplementedError

    def stop(self) -> None:
        """End it in order, leaving the data folder for the next start."""
        if self._child is not None:
            self._child.stop(STOP_SECONDS)
            self._child = None

    def terminate(self) -> None:
        """Ask it to end, without waiting."""
        if self._child is not None:
            self._child.terminate()

    def kill(self) -> None:
        """SIGKILL, as a crash would; `start()` starts it again on the same data and ports."""
        if self._child is not None:
            self._child.kill()

    def restart(self) -> None:
        self.stop()
        self.start()

    def wait_ready(self, timeout_seconds: float = START_SECONDS) -> None:
        """Wait until a client is served. Raises SandboxError with the log's end."""
        if self._child is None:
            raise SandboxError(f"{self.name} is not started")
        self._child.wait_ready(self._serves, self.name, timeout_seconds)

    def _serves(self) -> bool:
        raise NotImplementedError
