"""How long our own certificates last, and the warnings: 30, 7 and 1 days ahead, and when it is over."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from shared.errors import OperatorError

# Days ahead of the end; each is warned of once in the log, and stands in /health from then on.
WARNED_DAYS = (30, 7, 1, 0)


@dataclass(frozen=True)
class Certificate:
    """One of our certificates: where it lies and when it ends."""

    path: Path
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
            return f"the certificate {self.path} has expired at {at}"
        left = self.ends_at - now
        days = f"{left.days} days" if left.days >= 2 else f"{int(left.total_seconds() // 3600)} hours"
        return f"the certificate {self.path} expires in {days}, at {at}"


def read_certificates(paths: tuple[Path, ...]) -> tuple[Certificate, ...]:
    """Every certificate of every chain: the first of a file to end is what counts. Raises OperatorError."""
    return tuple(Certificate(path, _first_end(path)) for path in paths)


def _first_end(path: Path) -> datetime:
    try:
        chain = x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise OperatorError(f"{path}: no certificate can be read from it (SKIP_TLS_CERT_FILE)") from error
    return min(certificate.not_valid_after_utc for certificate in chain)


def utc_now() -> datetime:
    """The present time."""
    return datetime.now(UTC)
