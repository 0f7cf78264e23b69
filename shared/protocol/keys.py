"""Keys, keyIds and their sizes (draft sections 4.2 and 4.3). Pure.

A keyId made here has 16 random bytes; 16 to 64 bytes of hex in any case are accepted (the draft's example has 24). Key
sizes are multiples of 8 from 128 to 512 bits.
"""

from __future__ import annotations

import re

KEY_ID_BYTES = 16
DEFAULT_KEY_BITS = 256
MIN_KEY_BITS = 128
MAX_KEY_BITS = 512
DEFAULT_ENTROPY_BITS = 256
MIN_ENTROPY_BITS = 8
MAX_ENTROPY_BITS = 8192

_KEY_ID = re.compile(r"(?:[0-9a-fA-F]{2}){16,64}")
_DECIMAL = re.compile(r"[1-9][0-9]{0,4}")


def parse_key_id(text: str) -> bytes:
    """The bytes of a hexadecimal keyId (draft 4.2.1). Raises ValueError with a sentence."""
    if not _KEY_ID.fullmatch(text):
        raise ValueError("keyId must be 32 to 128 hexadecimal digits, an even number of them")
    return bytes.fromhex(text)


def _parse_bits(text: str, name: str, low: int, high: int) -> int:
    if not _DECIMAL.fullmatch(text) or not low <= int(text) <= high or int(text) % 8:
        raise ValueError(f"{name} must be a decimal multiple of 8 from {low} to {high} bits")
    return int(text)


def parse_key_size(text: str) -> int:
    """A key size in bits (draft 4.2). Raises ValueError with a sentence."""
    return _parse_bits(text, "size", MIN_KEY_BITS, MAX_KEY_BITS)


def parse_entropy_size(text: str) -> int:
    """A minentropy in bits (draft 4.3). Raises ValueError with a sentence."""
    return _parse_bits(text, "minentropy", MIN_ENTROPY_BITS, MAX_ENTROPY_BITS)


def counted_before_ms(key_ttl_seconds: int) -> int:
    """How long (ms) before it is too old to be given out a key in stock no longer counts, so that it is replaced."""
    return min(10_000, key_ttl_seconds * 1000 // 16)
