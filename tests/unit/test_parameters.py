"""Facts about what a request may ask for: whatever a client sends gives its answer or a CallerError, never more."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote, quote_from_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipbus.services.api.http import parameters
from skipbus.shared.errors import CallerError
from skipbus.shared.protocol.system_ids import RemoteSystemIds

ALLOWED = RemoteSystemIds(["KP_Bob", "KP_*_Test", "a b+c&d=e;%"])


def remote(query: str) -> str:
    return parameters.remote_system_id(query, ALLOWED)


def refusal(read: Callable[[str], object], query: str) -> CallerError:
    with pytest.raises(CallerError) as caught:
        read(query)
    return caught.value


def refusal_if_any(read: Callable[[str], object], query: str) -> CallerError | None:
    try:
        read(query)
    except CallerError as error:
        return error
    return None


# --- remoteSystemID


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("remoteSystemID=KP_Bob", "KP_Bob"),
        ("remoteSystemId=KP_Bob", "KP_Bob"),  # as some clients spell it
        ("remoteSystemID=KP_x_Test", "KP_x_Test"),
        ("size=256&remoteSystemID=KP_Bob", "KP_Bob"),
        ("unknown=1&remoteSystemID=KP_Bob&unknown=2", "KP_Bob"),
        ("remoteSystemID=KP%5fBob", "KP_Bob"),
        ("%72emoteSystemID=KP_Bob", "KP_Bob"),
        ("remoteSystemID=" + quote("a b+c&d=e;%"), "a b+c&d=e;%"),
        ("remoteSystemID=a+b%2Bc%26d%3De%3B%25", "a b+c&d=e;%"),
        ("&&remoteSystemID=KP_Bob&&", "KP_Bob"),
    ],
)
def test_a_remote_system_id_of_the_list_is_accepted(query: str, expected: str) -> None:
    assert remote(query) == expected


@pytest.mark.parametrize("query", ["", "remotesystemid=KP_Bob", "remoteSystemIDs=KP_Bob", "size=256", "=KP_Bob"])
def test_a_missing_remote_system_id_is_named(query: str) -> None:
    error = refusal(remote, query)
    assert error.parameter == "remoteSystemID"
    assert "is missing" in str(error)


@pytest.mark.parametrize(
    "query",
    [
        "remoteSystemID=KP_Bob&remoteSystemID=KP_Bob",
        "remoteSystemID=KP_Bob&remoteSystemId=KP_Bob",
        "remoteSystemID=&remoteSystemID=KP_Bob",
        "remoteSystemID=KP_Bob&remoteSystemID",
    ],
)
def test_a_repeated_remote_system_id_is_refused_even_when_both_say_the_same(query: str) -> None:
    error = refusal(remote, query)
    assert error.parameter == "remoteSystemID"
    assert "more than once" in str(error)


HOSTILE_VALUES = [
    "",
    "%00",
    "KP_Bob%00",
    "KP_Bob%0a",
    "KP_Bob%0d%0aX: y",
    "%20KP_Bob",
    "KP_Bob%20",
    "KP_B%c3%b6b",
    "%ff%fe",
    "%ed%a0%80",  # a surrogate
    "%",
    "%zz",
    "%u0041",
    "KP_*",
    "*",
    "KP_%3f",
    "[!x]P_Bob",
    "../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "' OR '1'='1",
    "KP_Bob'; DROP TABLE key_records; --",
    "<script>alert(1)</script>",
    "kp_bob",
    "KP_Alice",
    "x" * 65,
    "x" * 2000,
    "\u2066KP_Bob",
]


@pytest.mark.parametrize("value", HOSTILE_VALUES)
def test_a_hostile_remote_system_id_is_refused_by_name_and_never_echoed(value: str) -> None:
    error = refusal(remote, f"remoteSystemID={value}")
    assert error.parameter == "remoteSystemID"
    assert "remoteSystemID" in str(error)
    assert len(value) < 4 or value not in str(error)


# --- sizes


@pytest.mark.parametrize("query", ["", "remoteSystemID=KP_Bob", "Size=128", "minEntropy=128"])
def test_sizes_are_256_where_none_is_asked_for(query: str) -> None:
    assert parameters.key_size_bits(query) == 256
    assert parameters.entropy_size_bits(query) == 256


def test_sizes_are_what_was_asked_for() -> None:
    assert parameters.key_size_bits("remoteSystemID=KP_Bob&size=512") == 512
    assert parameters.entropy_size_bits("minentropy=8192") == 8192
    assert parameters.entropy_size_bits("minentropy=%38") == 8


@pytest.mark.parametrize(
    ("read", "name"), [(parameters.key_size_bits, "size"), (parameters.entropy_size_bits, "minentropy")]
)
@pytest.mark.parametrize(
    "values",
    [
        [""],
        ["0"],
        ["1"],
        ["-256"],
        ["256x"],
        ["1e3"],
        ["%00"],
        ["256%00"],
        ["99999999"],
        ["9" * 1000],
        ["NaN"],
        ["256", "256"],
    ],
    ids=str,
)
def test_a_bad_or_repeated_size_is_refused_by_name(read: Callable[[str], int], name: str, values: list[str]) -> None:
    error = refusal(read, "&".join(f"{name}={value}" for value in values))
    assert error.parameter == name
    assert name in str(error)


# --- keyId


@pytest.mark.parametrize("digits", [32, 48, 128])
def test_key_ids_of_16_to_64_bytes_are_read_in_any_case(digits: int) -> None:
    assert parameters.key_id("aB" * (digits // 2)) == b"\xab" * (digits // 2)


@pytest.mark.parametrize("text", ["", "/", "..", "0" * 31, "0" * 130, "g" * 32, "\x00" * 32, "\udcff" * 32])
def test_a_bad_key_id_is_refused_by_name(text: str) -> None:
    error = refusal(parameters.key_id, text)
    assert error.parameter == "keyId"
    assert "keyId" in str(error)


# --- anything at all


def test_a_query_of_too_many_fields_is_refused() -> None:
    assert refusal(remote, "&".join(["a=1"] * 17)).parameter == "query"
    assert remote("&".join(["a=1"] * 15 + ["remoteSystemID=KP_Bob"])) == "KP_Bob"


NAMES = st.sampled_from(["remoteSystemID", "remoteSystemId", "size", "minentropy", "", "x"])
TEXTS = st.text(st.characters(), max_size=80)  # lone surrogates too: that is how a path's stray bytes come in
VALUES = st.one_of(
    TEXTS,
    TEXTS.map(lambda text: quote(text, errors="surrogatepass")),
    st.binary(max_size=80).map(quote_from_bytes),
    st.sampled_from(HOSTILE_VALUES),
    st.integers().map(str),
)
QUERIES = st.one_of(
    TEXTS,
    st.lists(st.tuples(NAMES, VALUES), max_size=20).map(lambda pairs: "&".join("=".join(p) for p in pairs)),
)
PARAMETERS = {"remoteSystemID", "size", "minentropy", "keyId", "query"}


@pytest.mark.parametrize(
    "read",
    [remote, parameters.key_size_bits, parameters.entropy_size_bits, parameters.key_id],
    ids=["remoteSystemID", "size", "minentropy", "keyId"],
)
@given(query=QUERIES)
def test_no_query_raises_anything_but_a_caller_error_that_names_the_parameter(
    read: Callable[[str], object], query: str
) -> None:
    error = refusal_if_any(read, query)
    if error is not None:
        assert error.parameter in PARAMETERS
        assert error.parameter in str(error)
        assert str(error).isascii()
        assert len(str(error)) < 200


@given(value=st.text(max_size=80))
def test_only_ids_of_the_list_come_through(value: str) -> None:
    try:
        got = remote("remoteSystemID=" + quote(value, errors="surrogatepass"))
    except CallerError:
        assert value not in ALLOWED
    else:
        assert got == value
        assert value in ALLOWED
