"""Facts about answers: which error becomes which status, and what an answer never carries."""

from __future__ import annotations

import json

import pytest

from skipbus.services.api.http.responses import (
    RouteError,
    error_response,
    json_response,
    prepared_response,
    reason_of,
    secret_response,
)
from skipbus.services.api.links.store import not_available
from skipbus.shared.errors import (
    BackendError,
    BusUnavailable,
    CallerError,
    CommitUnknown,
    EnvelopeRefused,
    KeyNotAvailable,
    KeyringError,
    NoEntropy,
    NotPlaced,
    OperatorError,
    Overloaded,
    PeerError,
    PeerNotReady,
    SealBroken,
    SkipbusError,
    StoreConflict,
    StoreMisconfigured,
    StoreRefused,
    StoreUnavailable,
)

INNER = "table key_records of KP_Bob on 10.0.0.7"
ID = "abcdef01-7"


def all_errors(kind: type[SkipbusError] = SkipbusError) -> set[type[SkipbusError]]:
    found = {kind}
    for below in kind.__subclasses__():
        found |= all_errors(below)
    return {error for error in found if error.__module__ == "skipbus.shared.errors"}


# The draft's Tables 3, 7 and 9. The flag says whether the caller may read the error's own sentence.
STATUSES: list[tuple[SkipbusError, int, bool]] = [
    (CallerError(INNER, parameter="size"), 400, True),
    (KeyNotAvailable(INNER, parameter="keyId"), 400, True),
    (PeerNotReady(INNER), 500, True),
    (NotPlaced(INNER), 500, True),
    (SealBroken(INNER), 500, False),
    (PeerError(INNER), 500, False),
    (EnvelopeRefused("replayed", INNER), 500, False),
    (StoreUnavailable(INNER), 500, False),
    (CommitUnknown(INNER), 500, False),
    (StoreConflict(INNER), 500, False),
    (StoreRefused(INNER), 500, False),
    (StoreMisconfigured(INNER), 500, False),
    (BackendError(INNER), 500, False),
    (BusUnavailable(INNER), 500, False),
    (OperatorError(INNER), 500, False),
    (KeyringError(INNER), 500, False),
    (SkipbusError(INNER), 500, False),
    (Overloaded(INNER), 503, True),
    (NoEntropy(INNER), 503, True),
]


def test_every_error_of_the_tree_has_its_status_pinned_here() -> None:
    assert {type(error) for error, _, _ in STATUSES} == all_errors()


@pytest.mark.parametrize(
    ("error", "status", "own_words"), STATUSES, ids=[type(error).__name__ for error, _, _ in STATUSES]
)
def test_an_error_becomes_its_status_and_one_json_sentence(error: SkipbusError, status: int, own_words: bool) -> None:
    response = error_response(error, ID)
    assert response.status == status
    assert isinstance(response.body, bytes)
    body = json.loads(response.body)
    assert list(body) == ["error"]
    assert (body["error"] == INNER) is own_words
    assert own_words or INNER not in response.body.decode()


@pytest.mark.parametrize("error", [error for error, _, _ in STATUSES], ids=lambda error: type(error).__name__)
def test_an_error_is_json_that_no_cache_keeps_and_carries_the_correlation_id(error: SkipbusError) -> None:
    headers = error_response(error, ID).headers
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Request-ID"] == ID


def test_only_a_503_says_when_to_come_again() -> None:
    for error, status, _ in STATUSES:
        assert ("Retry-After" in error_response(error, ID).headers) is (status == 503)
    assert error_response(Overloaded(""), ID).headers["Retry-After"] == "1"


@pytest.mark.parametrize("status", [400, 404, 405, 413, 417])
def test_a_route_error_has_its_own_status_and_headers(status: int) -> None:
    response = error_response(RouteError(status, "sentence", Allow="GET", X_More="1"), ID)
    assert response.status == status
    assert response.headers["Allow"] == "GET"
    assert response.headers["X-More"] == "1"


def test_the_headers_of_one_answer_do_not_stay_for_the_next() -> None:
    error_response(RouteError(405, "sentence", Allow="GET"), ID)
    error_response(Overloaded(""), "other")
    later = error_response(CallerError("sentence", parameter="size"), ID).headers
    assert "Allow" not in later
    assert "Retry-After" not in later
    assert later["X-Request-ID"] == ID
    assert "X-Request-ID" not in secret_response(b"{}").headers


def test_secrets_are_never_cached_and_other_answers_may_be() -> None:
    assert secret_response(b"{}").headers["Cache-Control"] == "no-store"
    assert secret_response(b"{}").headers["Pragma"] == "no-cache"
    assert "Cache-Control" not in json_response({}).headers
    assert "Cache-Control" not in prepared_response(b"{}").headers


def test_no_answer_tells_the_servers_version() -> None:
    for response in (json_response({}), secret_response(b"{}"), error_response(SkipbusError(), ID)):
        assert response.headers["Server"] == "skipbus"


def test_the_log_gets_the_reason_that_the_caller_does_not() -> None:
    error = not_available("the key is for key provider KP_Carol")
    assert "KP_Carol" not in str(error)
    response = error_response(error, ID)
    assert isinstance(response.body, bytes)
    assert b"KP_Carol" not in response.body
    assert "KP_Carol" in reason_of(error)


def test_a_reason_goes_down_to_our_own_causes_but_not_to_the_drivers() -> None:
    error, ours = CommitUnknown("broke during a commit"), StoreUnavailable("the store cannot be used now")
    error.__cause__, ours.__cause__ = ours, OSError("driver words")
    assert reason_of(error) == "broke during a commit; the store cannot be used now"


def test_a_kp_that_never_announced_itself_is_named_to_the_caller() -> None:
    response = error_response(PeerNotReady("KP_Bob has not announced itself"), ID)
    assert response.status == 500
    assert isinstance(response.body, bytes)
    assert "KP_Bob has not announced itself" in json.loads(response.body)["error"]
