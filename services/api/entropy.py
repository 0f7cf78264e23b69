"""Random bytes of the operating system, for keys, keyIds and ``GET /entropy`` (draft 4.2.1 and 4.3)."""

from __future__ import annotations

import os

from skipbus.shared.errors import NoEntropy
from skipbus.shared.protocol.keys import KEY_ID_BYTES


def random_bytes(count: int) -> bytes:
    """So many random bytes. Raises NoEntropy."""
    try:
        return os.urandom(count)
    except OSError as error:
        raise NoEntropy("the random number generator of the operating system failed") from error


def new_key_id() -> bytes:
    """A new 128-bit keyId (draft 4.2.1). Raises NoEntropy."""
    return random_bytes(KEY_ID_BYTES)
