"""Owns how a log event becomes a line: its fields, what may be shown of a value, causes, redaction.

Rules: no I/O; rendering never raises, whatever is in an event; octets are counted and never shown,
because they may be a key; the text of a known secret, and any password in a URL, becomes `***`.
Leaves to others: setting the logs up (`skipbus.shared.logs`) and writing lines (`skipbus.shared.line_writer`).
"""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from urllib.parse import unquote, urlsplit

import orjson
from structlog.dev import ConsoleRenderer, plain_traceback
from structlog.typing import EventDict, Processor

from skipbus.shared.secret import HIDDEN, Secret

Redact = Callable[[bytes], bytes]

_MAX_CAUSES = 8
_MAX_MESSAGE_LENGTH = 300
_MAX_TRACEBACK_LENGTH = 20_000
_MAX_DEPTH = 6
_URL_PASSWORD = re.compile(rb"(://[^/\s:@\"']*:)[^/\s@\"']+@")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_CONTROLS_BUT_LINE_END = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_SHORT_SPELLINGS = {"\n": b"n", "\t": b"t", "\r": b"r", " ": rb"\+"}
_LEVELS = {"exception": "error", "warn": "warning", "fatal": "critical", "msg": "info"}


def utc_timestamp(now_seconds: float) -> str:
    """The time since the epoch as ISO 8601 in UTC, to the millisecond, with a Z."""
    now_ms = int(now_seconds * 1000)
    return f"{_second_text(now_ms // 1000)}.{now_ms % 1000:03d}Z"


@lru_cache(maxsize=4)
def _second_text(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def fields(service: str, system_id: str) -> Processor:
    """A processor that puts the fields of every line first. They win over bound fields of the same names."""

    def add(_logger: object, method: str, event: EventDict) -> EventDict:
        first = {
            "timestamp": utc_timestamp(time.time()),
            "level": _LEVELS.get(method, method),
            "event": event.pop("event", ""),
            "service": service,
            "system_id": system_id,
            "pid": os.getpid(),
        }
        return {**first, **{name: value for name, value in event.items() if name not in first}}

    return add


def explain_exception(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Turn `exc_info` into `error`, the chain of causes in one line, and `traceback`."""
    error = _exception_of(event.pop("exc_info", None))
    if error is not None:
        event["error"] = cause_chain(error)
        event["traceback"] = _traceback_of(error)
    return event


def _exception_of(given: object) -> BaseException | None:
    if isinstance(given, tuple) and len(given) == 3:
        given = given[1]
    if isinstance(given, BaseException):
        return given
    return sys.exc_info()[1] if given else None


def _traceback_of(error: BaseException) -> str:
    # The last part is kept where it is too long: there the exception itself stands. Locals are never shown.
    return "".join(traceback.format_exception(error))[-_MAX_TRACEBACK_LENGTH:]


def cause_chain(error: BaseException) -> str:
    """The exception and its causes in one line, the outermost first."""
    return "; caused by ".join(_one_line(link) for link in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen and len(seen) < _MAX_CAUSES:
        yield link
        seen.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _one_line(error: BaseException) -> str:
    message = " ".join(_text_of(error, str).split())
    name = type(error).__name__
    text = f"{name}: {message[:_MAX_MESSAGE_LENGTH]}" if message else name
    if isinstance(error, BaseExceptionGroup):
        return f"{text} [{', '.join(cause_chain(part) for part in error.exceptions[:_MAX_CAUSES])}]"
    return text


def _text_of(value: object, convert: Callable[[object], str]) -> str:
    # repr and str run code that is not ours: a log line must come out even so.
    try:
        return convert(value)
    except Exception:  # noqa: BLE001
        return f"<{type(value).__name__} that cannot be shown>"


def show_plainly(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Replace each value by one that any renderer takes and that gives no octets away."""
    return {_clean(str(name)): plain(value) for name, value in event.items()}


def plain(value: object, depth: int = 0) -> object:
    """`value` in texts, numbers, lists and dictionaries. Octets become their count."""
    if not isinstance(value, Mapping | list | tuple | set | frozenset):
        return _plain_leaf(value)
    if depth == _MAX_DEPTH:
        return "..."
    if isinstance(value, Mapping):
        return {_clean(str(plain(name))): plain(item, depth + 1) for name, item in value.items()}
    return [plain(item, depth + 1) for item in value]


def _plain_leaf(value: object) -> object:
    match value:
        case None | bool() | float():
            return value
        case int() if abs(value) < 1 << 53:
            return value
        case bytes() | bytearray() | memoryview():
            return f"<{len(value)} bytes>"
        case str():
            return _clean(value)
        case BaseException():
            return _clean(cause_chain(value))
    return _clean(_text_of(value, repr))


def _clean(text: str) -> str:
    """`text` without lone surrogates, which a client can bring in and UTF-8 cannot carry."""
    return text.encode("utf-8", "backslashreplace").decode()


def json_renderer(redact: Redact) -> Processor:
    """The last processor: one JSON object a line, without known secrets."""

    def render(_logger: object, _method: str, event: EventDict) -> bytes:
        line = orjson.dumps(event)
        redacted = redact(line)
        if redacted == line or _is_json(redacted):
            return redacted
        # A secret such as `1` or `:` was within the JSON's own signs. What is left is kept as one text, in
        # which the secret can only stand as such a sign again.
        text = orjson.dumps({"event": redacted.decode("utf-8", "replace")})
        return redact(text) if _is_json(redact(text)) else text

    return render


def _is_json(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def console_renderer(redact: Redact, *, colors: bool) -> Processor:
    """The last processor in development: aligned fields to be read by people, without known secrets."""
    # The formatter is named because the default one shows local variables where `rich` is installed.
    show = ConsoleRenderer(colors=colors, exception_formatter=plain_traceback, sort_keys=False)

    def render(logger: object, method: str, event: EventDict) -> bytes:
        shown = {name: _visible(value, _CONTROLS) for name, value in event.items() if name != "traceback"}
        if "traceback" in event:
            shown["exception"] = _visible(event["traceback"], _CONTROLS_BUT_LINE_END)
        return redact(str(show(logger, method, shown)).encode())

    return render


def _visible(value: object, controls: re.Pattern[str]) -> object:
    """A text whose control characters are spelt out: a client's text must not steer the terminal."""
    if not isinstance(value, str):
        return value
    return controls.sub(lambda found: f"\\x{ord(found[0]):02x}", value)


def redactor(secrets: Iterable[Secret]) -> Redact:
    """A function that replaces the texts of `secrets`, however they are escaped, and passwords in URLs."""
    texts = {text for secret in secrets for text in _texts(secret.reveal())}
    # The longest first: a secret that begins with another one must go whole.
    ordered = sorted(texts, key=len, reverse=True)
    known = re.compile(b"|".join(map(_pattern, ordered))) if ordered else None
    hidden = HIDDEN.encode()

    def redact(line: bytes) -> bytes:
        if known is not None:
            line = known.sub(hidden, line)
        return _URL_PASSWORD.sub(rb"\1***@", line) if b"://" in line else line

    return redact


def _texts(text: str) -> set[str]:
    """The texts to hide for one secret: itself, and the password in it where it is a URL."""
    try:
        password = urlsplit(text).password or ""
    except ValueError:
        password = ""
    return {text, password, unquote(password)} - {""}


def _pattern(text: str) -> bytes:
    """A pattern for `text` as it is, or as JSON, Python or a URL writes it, escaped any number of times."""
    # A run of backslashes is taken whole, from its beginning and without a second try (`++`): a client that
    # makes lines full of backslashes must not make the search slow.
    start = b"" if _is_plain(text[0]) else rb"(?<!\\)"
    return start + b"".join(map(_spellings, re.sub(r"\\+", r"\\", text)))


def _spellings(character: str) -> bytes:
    if character == "\\":
        return rb"(?i:\\|%5c)++"
    if _is_plain(character):
        return character.encode()
    octets = character.encode("utf-8", "surrogatepass")
    forms = [
        re.escape(octets),
        b"".join(b"%%%02x" % octet for octet in octets),
        rb"\\*+".join(b"x%02x" % octet for octet in octets),
        b"x%02x|u%04x|U%08x" % ((ord(character),) * 3),
        _SHORT_SPELLINGS.get(character, re.escape(octets)),
    ]
    return rb"\\*+(?i:%s)" % b"|".join(forms)


def _is_plain(character: str) -> bool:
    """Whether the character is never escaped."""
    return character.isascii() and character.isalnum()
