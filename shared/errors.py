"""The error tree, by whose fault it is: the caller's, the peer's, a backend's, or ours.

A message is one sentence that every client may read, and never has key material. One place maps errors to HTTP
statuses (``skipbus.services.api.http.responses``), and one maps them to accepting or rejecting an envelope
(``skipbus.services.syncer.receive``). Driver errors are wrapped where the driver is used, and keep their cause.
"""

from __future__ import annotations


class SkipbusError(Exception):
    """Base of all errors that skipbus raises on purpose."""


class CallerError(SkipbusError):
    """The encryptor asked for something that it may not have, or in a wrong form (400)."""

    def __init__(self, message: str, *, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class KeyNotAvailable(CallerError):
    """No key for this keyId waits here for this remoteSystemID (400, draft Table 7)."""


class PeerError(SkipbusError):
    """A peer sent something that is rejected, or has not sent what is needed."""

    reason = "peer_error"


class PeerNotReady(PeerError):
    """Keys cannot be sealed to the peer now: it has not announced itself, or its epochs ran out (500)."""

    reason = "peer_not_ready"


class NotPlaced(PeerNotReady):
    """The peer rejected a key or did not store it in time; the key is withdrawn (500)."""

    reason = "not_placed"


class EnvelopeRefused(PeerError):
    """An envelope is rejected; ``reason`` is one of a fixed set, which is counted, and the envelope dead-lettered."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class SealBroken(PeerError):
    """A sealed record, wrapping key or announcement does not open or verify."""

    reason = "seal_broken"


class BackendError(SkipbusError):
    """MySQL or RabbitMQ failed."""


class StoreUnavailable(BackendError):
    """The store cannot be reached, or did not answer in time; another try may succeed."""


class StoreConflict(StoreUnavailable):
    """Another transaction was in the way: this one must be rolled back, and is worth an immediate retry."""


class StoreRefused(BackendError):
    """The store answered with an error that another try does not fix."""


class StoreMisconfigured(StoreRefused):
    """The store answers so to every such statement, whatever its values, until an operator has changed something."""


class CommitUnknown(StoreUnavailable):
    """The connection was lost during a commit: it may or may not have happened."""


class BusUnavailable(BackendError):
    """The broker cannot be reached or did not confirm a message."""


class Overloaded(SkipbusError):
    """Too many callers wait already (503 with Retry-After)."""


class NoEntropy(SkipbusError):
    """The operating system's random number generator failed (503, draft Table 9)."""


class OperatorError(SkipbusError):
    """A problem that only an operator can fix; the message says how."""


class KeyringError(OperatorError):
    """The keyring is missing, damaged, readable by others or another KP's."""
