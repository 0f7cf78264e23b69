"""The one error tree, by whose fault it is: the caller's, the peer's, a backend's, or ours.

Rules: a message is one sentence that a stranger may read; it never carries key material. An error
becomes an HTTP status in one place (``skipbus.services.api.responses``) and an ack or a reject in one other
(``skipbus.services.syncer.inbox``). Driver errors are wrapped where the driver is used, cause kept.
"""

from __future__ import annotations


class SkipbusError(Exception):
    """Base of all errors that skipbus raises on purpose."""


class CallerError(SkipbusError):
    """The encryptor asked for something it may not have or said it wrongly (400)."""

    def __init__(self, message: str, *, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class KeyNotAvailable(CallerError):
    """No key for this keyId waits here for this remoteSystemID (400, draft Table 7)."""


class PeerError(SkipbusError):
    """A peer sent something that is refused, or has not sent what is needed."""

    reason = "peer_error"


class PeerNotReady(PeerError):
    """Keys cannot be sealed to the peer now: it has not announced itself, or its epochs ran out (500)."""

    reason = "peer_not_ready"


class NotPlaced(PeerNotReady):
    """The peer refused a key or did not store it in time; the key is withdrawn (500)."""

    reason = "not_placed"


class EnvelopeRefused(PeerError):
    """An envelope is not accepted; ``reason`` is one of a fixed set, counted and dead-lettered."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class IdentityChanged(PeerError):
    """A KP presents another identity than the one pinned for it; an operator must accept it first."""

    reason = "identity_changed"


class SealBroken(PeerError):
    """A sealed record, wrapping key or announcement does not open or verify."""

    reason = "seal_broken"


class BackendError(SkipbusError):
    """MySQL or RabbitMQ did not do its part."""


class StoreUnavailable(BackendError):
    """The store cannot be reached, or did not answer in time; worth another try."""


class StoreConflict(StoreUnavailable):
    """Another transaction was in the way: this one must be rolled back, and is worth another try at once."""


class StoreRefused(BackendError):
    """The store answered with an error that another try will not mend."""


class CommitUnknown(StoreUnavailable):
    """The connection was lost during a commit: it may or may not have happened."""


class BusUnavailable(BackendError):
    """The broker cannot be reached or did not confirm a message."""


class Overloaded(SkipbusError):
    """More callers wait than may wait (503 with Retry-After)."""


class NoEntropy(SkipbusError):
    """The operating system's random number generator failed (503, draft Table 9)."""


class OperatorError(SkipbusError):
    """Something that only an operator can put right; the message says how."""


class KeyringError(OperatorError):
    """The keyring is missing, damaged, readable by others or another KP's."""
