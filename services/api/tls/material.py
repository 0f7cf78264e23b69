"""The TLS port for the main program, and its certificates and pre-shared keys.

Files are read again on SIGHUP and when they have changed. Rules: open connections keep what they started with; only a
restart ends them. New files take effect together when they have not changed for a second, or immediately on SIGHUP. If
a file cannot be used, this is logged once and shown in /health, and the old files stay in use. The end of a certificate
is warned of 30, 7 and 1 days ahead, and when it has come: for the server's own, and for the client authorities, because
all certificates below one end with it.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from skipbus.services.api.http.server import BoundedServer
from skipbus.services.api.tls.callers import CallerBook
from skipbus.services.api.tls.context import Recipe, make_context
from skipbus.services.api.tls.handshake import TlsContext
from skipbus.services.api.tls.listener import TlsListener
from skipbus.services.api.tls.self_check import find_psk_modes
from skipbus.shared.errors import OperatorError
from skipbus.shared.lifecycle import pause_to_tick
from skipbus.shared.logging import get_logger
from skipbus.shared.protocol.psk_file import PskKeys, read_psk_file
from skipbus.shared.settings import Settings, TlsSettings

_CHECK_SECONDS = 1.0
_log = get_logger("tls")
# Distinguishes versions of a file; None if there is no file.
Stamp = tuple[int, int, int] | None
# Days ahead of the end; each is logged once, and /health shows the warning from then on.
WARNED_DAYS = (30, 7, 1, 0)


@dataclass(frozen=True)
class Certificate:
    """One certificate: its name for the operator, and its end."""

    name: str
    ends_at: datetime

    def warned_days(self, now: datetime) -> int | None:
        """The latest of ``WARNED_DAYS`` that has come; None while the end is far."""
        return min((days for days in WARNED_DAYS if now >= self.ends_at - timedelta(days=days)), default=None)

    def warning(self, now: datetime) -> str | None:
        """A sentence, if the end is near."""
        if self.warned_days(now) is None:
            return None
        at = self.ends_at.strftime("%Y-%m-%dT%H:%M:%SZ")
        if now >= self.ends_at:
            return f"the certificate {self.name} has expired at {at}"
        left = self.ends_at - now
        days = f"{left.days} days" if left.days >= 2 else f"{int(left.total_seconds() // 3600)} hours"
        return f"the certificate {self.name} expires in {days}, at {at}"


class Material:
    """The files in use. ``context`` is the one for new connections."""

    def __init__(self, recipe: Recipe) -> None:
        """Reads everything. Raises OperatorError."""
        self._recipe = recipe
        self._paths = _paths(recipe.settings)
        self._loaded = self._seen = self._stamps()
        self._fault: str | None = None
        self._warned: dict[Certificate, int] = {}
        self._certificates: tuple[Certificate, ...] = ()
        self.context: TlsContext
        self.psk_count = 0
        self._take(self._read())

    def warnings(self) -> list[str]:
        """Sentences for the operator."""
        ends = [certificate.warning(datetime.now(UTC)) for certificate in self._certificates]
        return [
            text
            for text in (self._recipe.modes.fault if self._recipe.settings.psk_files else None, self._fault, *ends)
            if text
        ]

    async def watch(self, stop: asyncio.Event, hangup: asyncio.Event) -> None:
        """Checks the files every second, and immediately after ``hangup``, until ``stop``."""
        while await pause_to_tick(stop, _CHECK_SECONDS) or hangup.is_set():
            if stop.is_set():
                return
            self.warn_of_ends()
            stamps = await asyncio.to_thread(self._stamps)
            # A pair of files is not replaced in one step: it is read when it did not change since the last check.
            settled, self._seen = stamps == self._seen, stamps
            if hangup.is_set() or (settled and stamps != self._loaded):
                hangup.clear()
                self._loaded = stamps
                await self.reload()

    async def reload(self) -> None:
        """Reads everything again; if that fails, the old files stay in use."""
        try:
            self._take(await asyncio.to_thread(self._read))
        except Exception as error:  # noqa: BLE001 -- no content of a file may end a process that serves
            reason = str(error) if isinstance(error, OperatorError) else f"{type(error).__name__}: {error}"
            self._fault = f"the old TLS files stay in use: {reason}"
            _log.error("tls files refused", reason=reason)
            return
        _log.info("tls files read again", psk_identities=self.psk_count, certificates=len(self._certificates))

    def warn_of_ends(self) -> None:
        """Logs each warning about the end of a certificate once."""
        now = datetime.now(UTC)
        for certificate in self._certificates:
            days = certificate.warned_days(now)
            if days is not None and self._warned.get(certificate, days + 1) > days:
                self._warned[certificate] = days
                _log.warning("certificate ends", reason=certificate.warning(now))

    def _read(self) -> tuple[TlsContext, tuple[Certificate, ...]]:
        settings = self._recipe.settings
        keys = PskKeys()
        for path in settings.psk_files:
            keys = read_psk_file(path)
        context = make_context(self._recipe, keys)
        return context, read_certificates(settings.cert_files) + read_authorities(settings.client_ca_files)

    def _take(self, read: tuple[TlsContext, tuple[Certificate, ...]]) -> None:
        self.context, self._certificates = read
        self.psk_count = len(self.context.keys)
        self._fault = None
        self._warned.clear()
        self.warn_of_ends()

    def _stamps(self) -> tuple[Stamp, ...]:
        return tuple(_stamp(path) for path in self._paths)


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
        material, tls = self._material, self._settings.tls
        if material is None:
            return
        self._listener = TlsListener(
            server,
            lambda: material.context,
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


def _paths(settings: TlsSettings) -> tuple[Path, ...]:
    return (*settings.cert_files, *settings.key_files, *settings.client_ca_files, *settings.psk_files)


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def read_certificates(paths: tuple[Path, ...]) -> tuple[Certificate, ...]:
    """One entry for each chain, with its earliest end. Raises OperatorError."""
    return tuple(Certificate(str(path), min(map(_end, _read_pem(path)))) for path in paths)


def read_authorities(paths: tuple[Path, ...]) -> tuple[Certificate, ...]:
    """One entry for each authority in the files: the others stay valid when one ends. Unreadable ones are left out."""
    return tuple(authority for path in paths for authority in _authorities(path))


def _authorities(path: Path) -> Iterator[Certificate]:
    try:
        certificates = _read_pem(path)
    except OperatorError as error:
        # OpenSSL has accepted the file and verifies with it, so this must not stop the process.
        _log.warning("expiry of client authorities is not checked", reason=str(error))
        return
    for certificate in certificates:
        subject = certificate.subject.rfc4514_string()[:100]
        yield Certificate(f"{path} ({ascii(subject)[1:-1]})", _end(certificate))


def _read_pem(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError, x509.InvalidVersion) as error:
        raise OperatorError(f"{path}: no certificate can be read from it") from error


def _end(certificate: x509.Certificate) -> datetime:
    return certificate.not_valid_after_utc
