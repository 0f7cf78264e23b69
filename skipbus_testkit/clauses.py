"""What draft-cisco-skip-02 says of a key provider, clause by clause, each as a question to two of them.

Rules: a clause has the draft's section, its strength and a sentence; its check returns None, or a sentence that says
what was seen instead. A check uses the draft's methods only, so it works on any SKIP key provider. No key is in a
sentence.
``MUST`` is also what the draft states as the form of an answer; ``SHOULD`` what it recommends.
Leaves to others: how a line is printed, and what a failure means for the exit code (``conformance``).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from skipbus_testkit.client import Answer, Client

Strength = Literal["MUST", "SHOULD"]
_HEX = re.compile(r"(?:[0-9A-Fa-f]{2})+")
# Nobody ever makes this one.
_UNKNOWN_KEY_ID = "00" * 16


class NotApplicable(Exception):
    """The key provider does not offer what the clause is about; the message says what."""


@dataclass(frozen=True)
class Party:
    """One key provider under test."""

    name: str
    client: Client

    def capabilities(self) -> dict[str, Any]:
        """Its capabilities, {} where it gives none."""
        body = self.client.get("capabilities").body
        return body if isinstance(body, dict) else {}

    @property
    def system_id(self) -> str:
        """Its localSystemID."""
        return str(self.capabilities().get("localSystemID", ""))


@dataclass(frozen=True)
class Clause:
    """One demand. ``check(a, b)`` asks ``a``, and ``b`` where it takes two; it is put to both ways."""

    section: str
    strength: Strength
    text: str
    check: Callable[[Party, Party], str | None]


def _tls(a: Party, _b: Party) -> str | None:
    if a.client.url.startswith("http:"):
        return "it was reached without TLS"
    answer = a.client.get("capabilities")
    if answer.tls_version not in ("TLSv1.2", "TLSv1.3"):
        return f"it chose {answer.tls_version}"
    return None


def _tls13_suite(a: Party, _b: Party) -> str | None:
    answer = a.client.get("capabilities")
    if answer.tls_version != "TLSv1.3":
        raise NotApplicable("it did not choose TLS 1.3")
    return None if answer.cipher == "TLS_AES_256_GCM_SHA384" else f"it chose {answer.cipher}"


def _unknown_path(a: Party, _b: Party) -> str | None:
    return _status(a.client.get("no-such-method"), 404)


def _other_methods(a: Party, _b: Party) -> str | None:
    for method in ("POST", "PUT", "DELETE"):
        fault = _status(a.client.request(method, "/capabilities"), 405)
        if fault:
            return f"{method}: {fault}"
    return None


def _capabilities_schema(a: Party, _b: Party) -> str | None:
    answer = a.client.get("capabilities")
    kinds = {"entropy": bool, "key": bool, "algorithm": str, "localSystemID": str, "remoteSystemID": list}
    return _status(answer, 200) or _fields(answer.body, kinds) or _texts(answer.body["remoteSystemID"])


def _at_least_one_remote(a: Party, _b: Party) -> str | None:
    return None if a.capabilities().get("remoteSystemID") else "the list is empty"


def _lists_the_other(a: Party, b: Party) -> str | None:
    patterns = a.capabilities().get("remoteSystemID", [])
    wanted = b.system_id
    matched = any(fnmatch.fnmatchcase(wanted, str(pattern)) for pattern in patterns)
    return None if matched else f"no entry matches {wanted!r}"


def _key_schema(a: Party, b: Party) -> str | None:
    answer = _issue(a, b)
    return _fields(answer.body, {"keyId": str, "key": str}) or _hexadecimal(answer.body, "keyId", "key")


def _default_key_size(a: Party, b: Party) -> str | None:
    return _bits(_issue(a, b).body["key"], 256)


def _default_key_id_size(a: Party, b: Party) -> str | None:
    return _bits(_issue(a, b).body["keyId"], 128)


def _asked_key_size(a: Party, b: Party) -> str | None:
    return _bits(_issue(a, b, size="128").body["key"], 128)


def _fresh_keys(a: Party, b: Party) -> str | None:
    answers = [_issue(a, b).body for _ in range(3)]
    for field in ("keyId", "key"):
        if len({answer[field] for answer in answers}) < len(answers):
            return f"two requests were given the same {field}"
    return None


def _same_key(a: Party, b: Party) -> str | None:
    issued = _issue(a, b).body
    answer = _retrieve(b, issued["keyId"], a)
    fault = _status(answer, 200)
    if fault:
        return fault
    same = all(str(answer.body.get(name, "")).lower() == issued[name].lower() for name in ("keyId", "key"))
    return None if same else "the two ends were given different answers"


def _asked_size_at_the_other_end(a: Party, b: Party) -> str | None:
    issued = _issue(a, b, size="128").body
    answer = _retrieve(b, issued["keyId"], a)
    return _status(answer, 200) or _bits(answer.body["key"], 128)


def _gone_after_retrieval(a: Party, b: Party) -> str | None:
    key_id = _issue(a, b).body["keyId"]
    fault = _status(_retrieve(b, key_id, a), 200)
    return f"the first retrieval: {fault}" if fault else _refused(_retrieve(b, key_id, a))


def _gone_at_the_source(a: Party, b: Party) -> str | None:
    return _refused(_retrieve(a, _issue(a, b).body["keyId"], b))


def _unknown_key_id(a: Party, b: Party) -> str | None:
    return _status(_retrieve(a, _UNKNOWN_KEY_ID, b), 400)


def _malformed_key_id(a: Party, b: Party) -> str | None:
    return _status(_retrieve(a, "not-hexadecimal", b), 400)


def _wrong_remote(a: Party, b: Party) -> str | None:
    key_id = _issue(a, b).body["keyId"]
    answer = b.client.get("key", key_id, remoteSystemID="skipbus-conformance-nobody")
    return _refused(answer)


def _entropy_schema(a: Party, _b: Party) -> str | None:
    answer = _entropy(a)
    return _fields(answer.body, {"randomStr": str, "minentropy": int}) or _hexadecimal(answer.body, "randomStr")


def _default_entropy(a: Party, _b: Party) -> str | None:
    body = _entropy(a).body
    return _bits(body["randomStr"], 256) or (
        None if body["minentropy"] == 256 else f"minentropy is {body['minentropy']}"
    )


def _asked_entropy(a: Party, _b: Party) -> str | None:
    body = _entropy(a, minentropy="128").body
    return _bits(body["randomStr"], 128) or (
        None if body["minentropy"] == 128 else f"minentropy is {body['minentropy']}"
    )


def _fresh_entropy(a: Party, _b: Party) -> str | None:
    samples = {_entropy(a).body["randomStr"] for _ in range(3)}
    return None if len(samples) == 3 else "two samples are the same"


CLAUSES: tuple[Clause, ...] = (
    Clause("3", "MUST", "HTTP is spoken over TLS 1.2 or 1.3", _tls),
    Clause("3, Table 1", "MUST", "TLS 1.3 uses TLS_AES_256_GCM_SHA384", _tls13_suite),
    Clause("4, Table 3", "SHOULD", "a path outside of Table 2 is answered 404", _unknown_path),
    Clause("4, Table 3", "SHOULD", "a method other than GET is answered 405", _other_methods),
    Clause("4.1", "MUST", "/capabilities has all fields of Table 4 in their types, as JSON", _capabilities_schema),
    Clause("4.1.2", "MUST", "the remoteSystemID list has at least one entry", _at_least_one_remote),
    Clause("4.1.2", "MUST", "an entry of the list, or a glob, names the other key provider", _lists_the_other),
    Clause("4.2", "MUST", "/key answers keyId and key in hexadecimal, as JSON", _key_schema),
    Clause("4.2.1", "MUST", "a keyId has 128 bits by default", _default_key_id_size),
    Clause("4.2.1", "MUST", "each keyId belongs to one key", _fresh_keys),
    Clause("4.2.2", "MUST", "a key has 256 bits by default", _default_key_size),
    Clause("4.2", "MUST", "size=128 gives a key of 128 bits", _asked_key_size),
    Clause("2", "MUST", "the other key provider gives the same key for the keyId", _same_key),
    Clause("4.2", "MUST", "a key of 128 bits has 128 bits at the other end", _asked_size_at_the_other_end),
    Clause("4.2.2", "MUST", "a key is zeroized once it was given out for its keyId", _gone_after_retrieval),
    Clause("2", "MUST", "the key provider that made a key keeps no copy of it", _gone_at_the_source),
    Clause("4.2", "MUST", "a key is given only for the key provider that it is shared with", _wrong_remote),
    Clause("4.2, Table 7", "SHOULD", "a keyId that is not known is answered 400", _unknown_key_id),
    Clause("4.2, Table 7", "SHOULD", "a malformed keyId is answered 400", _malformed_key_id),
    Clause("4.3", "MUST", "/entropy answers randomStr in hexadecimal and minentropy, as JSON", _entropy_schema),
    Clause("4.3", "MUST", "a sample has 256 bits by default", _default_entropy),
    Clause("4.3", "MUST", "minentropy=128 gives 128 bits", _asked_entropy),
    Clause("4.3", "MUST", "no two samples are the same", _fresh_entropy),
)


def _issue(a: Party, b: Party, **query: str) -> Answer:
    if a.capabilities().get("key") is False:
        raise NotApplicable("it says that it has no /key")
    answer = a.client.get("key", remoteSystemID=b.system_id, **query)
    fault = _status(answer, 200) or _fields(answer.body, {"keyId": str, "key": str})
    if fault:
        raise Unusable(f"GET /key: {fault}")
    return answer


class Unusable(Exception):
    """What a clause needs first did not work; the message says what."""


def _retrieve(at: Party, key_id: str, source: Party) -> Answer:
    return at.client.get("key", key_id, remoteSystemID=source.system_id)


def _entropy(a: Party, **query: str) -> Answer:
    if a.capabilities().get("entropy") is False:
        raise NotApplicable("it says that it has no /entropy")
    answer = a.client.get("entropy", **query)
    fault = _status(answer, 200) or _fields(answer.body, {"randomStr": str, "minentropy": int})
    if fault:
        raise Unusable(f"GET /entropy: {fault}")
    return answer


def _status(answer: Answer, wanted: int) -> str | None:
    if answer.status == wanted:
        return None
    return f"answered {answer.status}, not {wanted}" + (f" ({answer.error})" if answer.error else "")


def _refused(answer: Answer) -> str | None:
    if answer.status == 200 or (isinstance(answer.body, dict) and "key" in answer.body):
        return "the key was given out"
    return None


def _fields(body: object, kinds: dict[str, type]) -> str | None:
    if not isinstance(body, dict):
        return "the answer is no JSON object"
    return next(_wrong_fields(body, kinds), None)


def _wrong_fields(body: dict[str, object], kinds: dict[str, type]) -> Iterator[str]:
    for name, kind in kinds.items():
        if name not in body:
            yield f"{name} is missing"
        # bool is a subclass of int: a number must not be `true`.
        elif type(body[name]) is not kind:
            yield f"{name} is of type {type(body[name]).__name__}"


def _texts(entries: list[object]) -> str | None:
    return None if all(isinstance(entry, str) for entry in entries) else "an entry of remoteSystemID is no string"


def _hexadecimal(body: dict[str, str], *names: str) -> str | None:
    wrong = [name for name in names if not _HEX.fullmatch(body[name])]
    return f"{', '.join(wrong)} is not hexadecimal" if wrong else None


def _bits(text: str, wanted: int) -> str | None:
    return None if len(text) * 4 == wanted else f"it has {len(text) * 4} bits"
