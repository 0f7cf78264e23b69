"""How long certificates last, and the warnings: 30, 7 and 1 days ahead, and when it is over.

Ours, because clients will refuse them; and the authorities of the clients, because with such a one every certificate
under it ends too, and all routers are locked out in the same second.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from skipbus.shared.errors import OperatorError
from skipbus.shared.logs import get_logger

_log = get_logger("tls")
# Days ahead of the end; each is warned of once in the log, and stands in /health from then on.
WARNED_DAYS = (30, 7, 1, 0)


@dataclass(frozen=True)
class Certificate:
    """One certificate: what an operator knows it by, and when it ends."""

    name: str
    ends_at: datetime

    def warned_days(self, now: datetime) -> int | None:
        """The last of ``WARNED_DAYS`` that has come; None while the end is far."""
        return min((days for days in WARNED_DAYS if now >= self.ends_at - timedelta(days=days)), default=None)

    def warning(self, now: datetime) -> str | None:
        """A sentence, once the end is near."""
        if self.warned_days(now) is None:
            return None
        at = self.ends_at.strftime("%Y-%m-%dT%H:%M:%SZ")
        if now >= self.ends_at:
            return f"the certificate {self.name} has expired at {at}"
        left = self.ends_at - now
        days = f"{left.days} days" if left.days >= 2 else f"{int(left.total_seconds() // 3600)} hours"
        return f"the certificate {self.name} expires in {days}, at {at}"


def read_certificates(paths: tuple[Path, ...]) -> tuple[Certificate, ...]:
    """Every certificate of every chain: the first of a file to end is what counts. Raises OperatorError."""
    return tuple(Certificate(str(path), min(map(_end, _read(path)))) for path in paths)


def read_authorities(paths: tuple[Path, ...]) -> tuple[Certificate, ...]:
    """Every authority in the files, each for itself: the others go on when one ends. What cannot be read has no end."""
    return tuple(authority for path in paths for authority in _authorities(path))


def _authorities(path: Path) -> Iterator[Certificate]:
    try:
        certificates = _read(path)
    except OperatorError as error:
        # OpenSSL has taken the file, and verifies with it: that its ends are not watched stops nothing.
        _log.warning("ends of authorities not watched", reason=str(error))
        return
    for certificate in certificates:
        subject = certificate.subject.rfc4514_string()[:100]
        yield Certificate(f"{path} ({ascii(subject)[1:-1]})", _end(certificate))


def _read(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError, x509.InvalidVersion) as error:
        raise OperatorError(f"{path}: no certificate can be read from it") from error


def _end(certificate: x509.Certificate) -> datetime:
    return certificate.not_valid_after_utc


def utc_now() -> datetime:
    """The present time."""
    return datetime.now(UTC)
