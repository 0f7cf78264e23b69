"""`Secret`: a text that must not be seen, such as a password or a URL with a password in it.

Rules: the text comes out by `reveal()` and by nothing else. `repr`, `str`, `format` and f-strings show `***`; pickling
and serialising raise, so that a secret cannot leave the process by accident.
"""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Callable
from typing import NoReturn

HIDDEN = "***"


class Secret:
    """A text that shows as `***` everywhere but in `reveal()`."""

    __slots__ = ("_reread", "_text")
    _text: str
    _reread: Callable[[], Secret] | None

    def __init__(self, text: str, reread: Callable[[], Secret] | None = None) -> None:
        """``reread`` reads the file again that the secret came from; it may raise any exception."""
        object.__setattr__(self, "_text", text)
        object.__setattr__(self, "_reread", reread)

    def current(self) -> Secret:
        """What its file holds now: credentials are changed while a process runs. Itself where that cannot be read."""
        with contextlib.suppress(Exception):
            return self._reread() if self._reread is not None else self
        return self

    def reveal(self) -> str:
        """Returns the text itself. Call it where the text is used, and keep the answer nowhere."""
        return self._text

    def __repr__(self) -> str:
        return HIDDEN

    def __format__(self, spec: str) -> str:
        return format(HIDDEN, spec)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(*(secret.reveal().encode("utf-8", "surrogatepass") for secret in (self, other)))

    def __hash__(self) -> int:
        return hash((Secret, self._text))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a Secret cannot be changed")

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: object) -> Secret:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Secret cannot be pickled: load the settings again in the other process")
