"""The rules of TLS that need no connection: the offered keys in a ClientHello, who is allowed what, and warnings."""

from __future__ import annotations

import ssl
import struct
import time
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipbus.services.api.tls import context as tls_context
from skipbus.services.api.tls import openssl
from skipbus.services.api.tls.callers import CallerBook
from skipbus.services.api.tls.material import Certificate
from skipbus.services.api.tls.psk import OfferedPsk, parse_offered

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def extension(*offered: OfferedPsk) -> bytes:
    identities = b"".join(
        struct.pack(">H", len(psk.identity)) + psk.identity + struct.pack(">I", psk.ticket_age) for psk in offered
    )
    binders = b"".join(bytes([psk.binder_bytes]) + b"\xaa" * psk.binder_bytes for psk in offered)
    return struct.pack(">H", len(identities)) + identities + struct.pack(">H", len(binders)) + binders


OFFERED = st.builds(
    OfferedPsk, st.binary(min_size=1, max_size=200), st.integers(0, 2**32 - 1), st.sampled_from([32, 48])
)


@given(st.lists(OFFERED, min_size=1, max_size=4))
def test_what_a_client_offers_is_read_with_the_binder_of_each(offered: list[OfferedPsk]) -> None:
    assert list(parse_offered(extension(*offered))) == offered


@given(st.binary(max_size=200))
def test_an_extension_of_any_bytes_is_read_or_refused(octets: bytes) -> None:
    try:
        list(parse_offered(octets))
    except (ValueError, struct.error):
        return


def reading_seconds(count: int) -> float:
    """The least of several, since the machine may be busy with other things."""
    octets = extension(*[OfferedPsk(b"", 0, 0)] * count)
    seconds = []
    for _ in range(7):
        started = time.process_time()
        assert len(list(parse_offered(octets))) == count
        seconds.append(time.process_time() - started)
    return min(seconds)


def test_what_is_offered_is_read_in_time_that_grows_no_faster_than_its_number() -> None:
    # Nine times as much; copying the rest for each of them made it fifty times and more.
    assert reading_seconds(9_000) < 27 * reading_seconds(1_000)


def test_a_list_that_this_openssl_does_not_know_changes_nothing_and_leaves_no_error_behind() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    library = openssl.library()
    assert library.set_groups(context, "secp384r1")
    for refused in ("no-such-group:X25519", "a//b", ""):
        assert not library.set_groups(context, refused)
    assert not library.set_signature_algorithms(context, "no-such-algorithm")
    assert library.ERR_peek_error() == 0


def test_the_hybrid_group_comes_first_exactly_where_openssl_has_it() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    hybrid, classical = tls_context._GROUPS
    assert hybrid.startswith("X25519MLKEM768/")
    assert openssl.library().set_groups(context, classical)
    assert openssl.library().set_groups(context, hybrid) == (ssl.OPENSSL_VERSION_INFO >= (3, 5))


def test_one_list_of_signature_algorithms_is_understood_by_every_openssl() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    assert openssl.library().set_signature_algorithms(context, tls_context._SIGNATURE_LISTS[-1])


def test_without_a_table_everybody_may_ask_for_everything() -> None:
    book = CallerBook({}, "KP_Alice")
    for caller in (book.identify(b"router", None), book.identify(None, None)):
        assert caller.may_ask_for("KP_Bob")


@pytest.mark.parametrize(
    ("identity", "allowed"),
    [
        (b"router-1", {"KP_Bob", "KP_Carol"}),
        (b"router-9", {"KP_Bob"}),
        (b"Router-1", set()),
        (b"a.router-1", set()),
        (b"", set()),
    ],
)
def test_a_caller_may_ask_for_what_all_patterns_that_match_allow(identity: bytes, allowed: set[str]) -> None:
    book = CallerBook({"router-*": ["KP_Bob"], "router-1": ["KP_C*"]}, "KP_Alice")
    caller = book.identify(identity, None)
    assert {name for name in ("KP_Bob", "KP_Carol", "KP_Dave") if caller.may_ask_for(name)} == allowed


def test_whoever_shows_nothing_may_ask_for_nothing_once_there_is_a_table() -> None:
    caller = CallerBook({"*": ["*"]}, "KP_Alice").identify(None, None)
    assert (caller.proof, caller.may_ask_for("KP_Bob")) == ("none", False)


@pytest.mark.parametrize(
    ("left", "warned"),
    [
        (timedelta(days=31), None),
        (timedelta(days=30), 30),
        (timedelta(days=8), 30),
        (timedelta(days=7), 7),
        (timedelta(hours=25), 7),
        (timedelta(hours=24), 1),
        (timedelta(seconds=1), 1),
        (timedelta(0), 0),
        (timedelta(days=-9), 0),
    ],
    ids=str,
)
def test_the_end_of_a_certificate_is_warned_of_30_7_and_1_days_ahead(left: timedelta, warned: int | None) -> None:
    certificate = Certificate("rsa.pem", NOW + left)
    assert certificate.warned_days(NOW) == warned
    assert (certificate.warning(NOW) is None) == (warned is None)


def test_a_warning_tells_how_long_is_left_and_then_that_it_is_over() -> None:
    ends = Certificate("rsa.pem", NOW)
    assert ends.warning(NOW - timedelta(days=3, hours=1)) == (
        "the certificate rsa.pem expires in 3 days, at 2026-11-23T12:00:00Z"
    )
    assert ends.warning(NOW - timedelta(hours=5, minutes=1)) == (
        "the certificate rsa.pem expires in 5 hours, at 2026-11-23T12:00:00Z"
    )
    assert ends.warning(NOW) == "the certificate rsa.pem has expired at 2026-11-23T12:00:00Z"
