"""The address of the plain port: loopback, unless the operator allows another one.

Keys are not encrypted on this port. stunnel on the same host may use it; nobody else should.
"""

from __future__ import annotations

import ipaddress

from skipbus.shared.logging import get_logger
from skipbus.shared.settings import Settings

_log = get_logger("api")


def plain_host(settings: Settings) -> str:
    """The host to bind the plain port to. Logs a warning if it is not the configured one, or not loopback."""
    if is_loopback(settings.host):
        return settings.host
    if settings.allow_plaintext:
        _log.warning("keys are served without TLS", host=settings.host, port=settings.port, why="SKIP_ALLOW_PLAINTEXT")
        return settings.host
    loopback = "::1" if ":" in settings.host else "127.0.0.1"
    _log.warning(
        "plain port on loopback only",
        host=loopback,
        port=settings.port,
        reason=f"SKIP_HOST is {settings.host}, and keys would leave this host in the clear",
        fix="use SKIP_TLS_PORT, or set SKIP_ALLOW_PLAINTEXT=1",
    )
    return loopback


def is_loopback(host: str) -> bool:
    """Whether only this host can reach it. A name other than localhost may be any address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in ("localhost", "localhost.localdomain", "ip6-localhost")
