"""The TLS port for the api's main program: started if it is configured, watched and closed."""

from __future__ import annotations

import asyncio
import signal

from skipbus.services.api.server import BoundedServer
from skipbus.services.api.tls.callers import CallerBook
from skipbus.services.api.tls.context import Recipe
from skipbus.services.api.tls.listener import TlsListener
from skipbus.services.api.tls.material import Material
from skipbus.services.api.tls.self_check import find_psk_modes
from skipbus.shared.logging import get_logger
from skipbus.shared.settings import Settings

_log = get_logger("tls")


class Tls:
    """The TLS port of one api process; does nothing if TLS is not configured."""

    def __init__(self, settings: Settings) -> None:
        """Reads certificates and keys. Raises OperatorError."""
        self._settings = settings
        self._listener: TlsListener | None = None
        self._material = _material(settings) if settings.tls.enabled else None

    def warnings(self) -> list[str]:
        """Sentences for /health."""
        return self._material.warnings() if self._material is not None else []

    async def listen(self, server: BoundedServer) -> None:
        """Starts to serve. Raises OperatorError."""
        if self._material is None:
            return
        tls = self._settings.tls
        self._listener = TlsListener(
            server,
            self._material,
            handshake_timeout_seconds=tls.handshake_timeout_seconds,
            max_connections_per_address=tls.max_connections_per_address,
            system_id=self._settings.local_system_id,
        )
        await self._listener.listen(self._settings.host, tls.port)

    async def watch(self, stop: asyncio.Event) -> None:
        """Reads files again on SIGHUP and when they change, until ``stop``."""
        hangup = asyncio.Event()
        # Without TLS too, so that SIGHUP does not end the process.
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hangup.set)
        if self._material is not None:
            await self._material.watch(stop, hangup)

    @property
    def handshaking(self) -> bool:
        """Whether a handshake is unfinished."""
        return self._listener is not None and self._listener.handshaking

    def stop_accepting(self) -> None:
        """Accepts no new connections; handshakes continue."""
        if self._listener is not None:
            self._listener.stop_accepting()

    def close(self) -> None:
        """Accepts no new connections, and ends handshakes."""
        if self._listener is not None:
            self._listener.close()


def _material(settings: Settings) -> Material:
    tls = settings.tls
    modes = find_psk_modes()
    if modes.fault is not None and tls.psk_files:
        _log.error("psk not in full", reason=modes.fault)
    callers = CallerBook(tls.identities, settings.local_system_id)
    material = Material(Recipe(tls, callers, modes))
    if tls.cert_files and not tls.client_ca_files:
        _log.warning("clients without a certificate are served", fix="set SKIP_TLS_CLIENT_CA_FILE")
    return material
