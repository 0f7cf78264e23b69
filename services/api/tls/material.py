"""The certificates and pre-shared keys in use, read again on SIGHUP and when their files change.

Rules: connections that exist go on with what they began with. New files take effect together, once they lie still for
a second, or at once on SIGHUP; what cannot be used is reported once, stands in /health, and the old material stays.
Keys that were taken out of the file end no connection: nothing but a restart does.
Leaves to others: what a context is made of (``skipbus.services.api.tls.context``).
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from skipbus.services.api.tls.certificates import Certificate, read_authorities, read_certificates, utc_now
from skipbus.services.api.tls.context import Recipe, make_context
from skipbus.services.api.tls.handshakes import TlsContext
from skipbus.shared.config import TlsSettings
from skipbus.shared.errors import OperatorError
from skipbus.shared.lifecycle import pause_to_beat
from skipbus.shared.logs import get_logger
from skipbus.shared.protocol.psk_file import PskKeys, read_psk_file

_LOOK_SECONDS = 1.0
_log = get_logger("tls")
# What tells one version of a file from another; None for a file that is not there.
Stamp = tuple[int, int, int] | None


class Material:
    """What TLS is served with. ``context`` is the one for new connections."""

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
        """What an operator should look at, in sentences."""
        ends = [certificate.warning(utc_now()) for certificate in self._certificates]
        return [
            text
            for text in (self._recipe.modes.fault if self._recipe.settings.psk_files else None, self._fault, *ends)
            if text
        ]

    async def watch(self, stop: asyncio.Event, hangup: asyncio.Event) -> None:
        """Looks at the files every second, and at once after ``hangup``, until ``stop``."""
        while await pause_to_beat(stop, _LOOK_SECONDS) or hangup.is_set():
            if stop.is_set():
                return
            self.warn_of_ends()
            stamps = await asyncio.to_thread(self._stamps)
            # A pair of files is not replaced in one step: only what lay still for one look is read.
            settled, self._seen = stamps == self._seen, stamps
            if hangup.is_set() or (settled and stamps != self._loaded):
                hangup.clear()
                self._loaded = stamps
                await self.reload()

    async def reload(self) -> None:
        """Reads everything again; the old stays where that fails."""
        try:
            self._take(await asyncio.to_thread(self._read))
        except Exception as error:  # noqa: BLE001 -- no file, whatever is in it, may end a process that serves
            reason = str(error) if isinstance(error, OperatorError) else f"{type(error).__name__}: {error}"
            self._fault = f"the old TLS files stay in use: {reason}"
            _log.error("tls files refused", reason=reason)
            return
        _log.info("tls files read again", psk_identities=self.psk_count, certificates=len(self._certificates))

    def warn_of_ends(self) -> None:
        """Logs each warning of an end once."""
        now = utc_now()
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


def _paths(settings: TlsSettings) -> tuple[Path, ...]:
    return (*settings.cert_files, *settings.key_files, *settings.client_ca_files, *settings.psk_files)


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
