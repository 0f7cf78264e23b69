"""Reads whole files that an operator named, and nothing but regular files of a sane size."""

from __future__ import annotations

import os
import stat

_MAX_FILE_OCTETS = 1 << 20


def read_regular_file(path: str) -> tuple[bytes, int]:
    """The whole file, and the mode of the file that was opened. Raises OSError, and ValueError with a sentence."""
    # O_NONBLOCK: opening a FIFO that has no writer would wait forever.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise ValueError("is not a regular file. Name a regular file.")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            octets = file.read(_MAX_FILE_OCTETS + 1)
    finally:
        os.close(descriptor)
    if len(octets) > _MAX_FILE_OCTETS:
        raise ValueError("is larger than 1 MiB. Name the right file.")
    return octets, mode
