"""Facts about system ids and the globs of the remote list (draft sections 4.1.1, 4.1.2, Table 5)."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipbus.shared.protocol.system_ids import RemoteSystemIds, is_pattern, validate_pattern, validate_system_id

PRINTABLE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=64)


@pytest.mark.parametrize(
    "text", ["K", "KP_Alice", "a b", "KP-1.example.net:8443", "'; DROP TABLE x;--", "<b>", "x" * 64]
)
def test_an_id_of_printable_ascii_is_accepted_as_it_is(text: str) -> None:
    assert validate_system_id(text) == text


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "is empty"),
        ("x" * 65, "has 65 characters"),
        (" KP", "starts or ends with a space"),
        ("KP ", "starts or ends with a space"),
        ("KP\n", "not printable ASCII"),
        ("\nKP", "not printable ASCII"),
        ("KP\x00", "not printable ASCII"),
        ("KP\x7f", "not printable ASCII"),
        ("KP_Ä", "not printable ASCII"),
        ("KP_\udcff", "not printable ASCII"),
        ("KP_*", "pattern characters"),
        ("KP_?", "pattern characters"),
        ("KP_[1]", "pattern characters"),
    ],
)
def test_anything_else_is_refused_with_a_sentence(text: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        validate_system_id(text)


@given(PRINTABLE)
def test_an_id_without_pattern_characters_matches_itself_only(text: str) -> None:
    if is_pattern(text) or text != text.strip():
        return
    remotes = RemoteSystemIds([text])
    assert text in remotes
    assert text.swapcase() == text or text.swapcase() not in remotes
    assert text + "x" not in remotes
    assert "x" + text not in remotes


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("KP_*", ["KP_", "KP_Alice", "KP_ and more"], ["KP", "kp_Alice", "xKP_Alice", ""]),
        ("KP_*_Test", ["KP__Test", "KP_a_Test", "KP_a_Test_Test"], ["KP_Test", "KP_a_Test2", "KP_a_test"]),
        ("KP_?", ["KP_1", "KP_*"], ["KP_", "KP_12"]),
        ("KP_[abc]", ["KP_a", "KP_c"], ["KP_d", "KP_A", "KP_ab", "KP_"]),
        ("KP_[!abc]", ["KP_d", "KP_A", "KP_!"], ["KP_a", "KP_", "KP_dd"]),
        ("KP_[0-9]", ["KP_0", "KP_9"], ["KP_-", "KP_a", "KP_10"]),
        ("KP_[a-]", ["KP_a", "KP_-"], ["KP_b"]),
        ("KP.1*", ["KP.1", "KP.1x"], ["KPx1"]),
        ("KP_[]ab]", ["KP_]", "KP_a", "KP_b"], ["KP_", "KP_[", "KP_]ab]"]),
        ("KP_[]]", ["KP_]"], ["KP_", "KP_[]]"]),
        ("KP_[!]a]", ["KP_b", "KP_!"], ["KP_]", "KP_a", "KP_!]a]"]),
        ("*", ["a", "KP_Alice"], []),
        ("(a|b)+*", ["(a|b)+"], ["a", "b"]),
    ],
)
def test_a_glob_matches_the_whole_id_case_sensitively(pattern: str, matching: list[str], others: list[str]) -> None:
    remotes = RemoteSystemIds([pattern])
    assert [text for text in matching if text not in remotes] == []
    assert [text for text in others if text in remotes] == []


def test_a_line_end_after_the_id_is_not_overlooked_by_a_glob() -> None:
    remotes = RemoteSystemIds(["KP_[ab]", "KQ_?"])
    assert "KP_a\n" not in remotes
    assert "KQ_1\n" not in remotes


def test_many_stars_do_not_backtrack_for_ever() -> None:
    remotes = RemoteSystemIds(["*a" * 31 + "*b"])
    started = time.monotonic()
    for _ in range(100):
        assert "a" * 64 not in remotes
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("KP_[ab", r"a \[ or \] without its partner"),
        ("KP_]", r"a \[ or \] without its partner"),
        ("KP_]a[", r"a \[ or \] without its partner"),
        ("KP_[a]]", r"a \[ or \] without its partner"),
        ("KP_[!", r"a \[ or \] without its partner"),
        ("KP_[]", r"an empty list, \[\] or \[!\], which matches nothing"),
        ("KP_[!]", r"an empty list"),
        ("[]", r"an empty list"),
        ("[a][]", r"an empty list"),
        ("KP_[]*", r"an empty list"),
        ("KP_[z-a]", r"the list \[z-a\], which matches nothing"),
        ("KP_[[ab]", r"a \[ within a list"),
        ("KP_[[:alpha:]]", r"a \[ or \] without its partner"),
        ("KP_[]_[ab]", r"a \[ within a list"),
        ("", "is empty"),
        ("x" * 65, "has 65 characters"),
        ("KP_\n*", "not printable ASCII"),
        (" *", "starts or ends with a space"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(pattern: str, fault: str) -> None:
    with pytest.raises(ValueError, match=f"^the remote system id .*{fault}"):
        validate_pattern(pattern)


@given(st.text("[]!a-", min_size=1, max_size=8))
def test_every_list_that_is_accepted_can_match_one_character(pattern: str) -> None:
    try:
        validate_pattern(pattern)
    except ValueError:
        return
    rest = pattern
    for found in re.findall(r"\[!?+\]?+[^\]]*\]", pattern):
        assert any(chr(code) in RemoteSystemIds([found]) for code in range(0x21, 0x7F)), found
        rest = rest.replace(found, "", 1)
    assert not set(rest) & set("[]")


def test_exact_ids_and_globs_stand_side_by_side_in_their_order() -> None:
    remotes = RemoteSystemIds(["KP_Bob", "KP_*_Test", "KP_Carol"])
    assert remotes.entries == ("KP_Bob", "KP_*_Test", "KP_Carol")
    assert remotes.exact == {"KP_Bob", "KP_Carol"}
    assert all(text in remotes for text in ("KP_Bob", "KP_x_Test", "KP_*_Test"))
    assert "KP_Dave" not in remotes


def test_the_local_id_is_in_the_list_only_where_it_stands_there_by_name() -> None:
    assert "KP_Alice" not in RemoteSystemIds(["KP_*"], "KP_Alice")
    assert "KP_Bob" in RemoteSystemIds(["KP_*"], "KP_Alice")
    assert "KP_Alice" in RemoteSystemIds(["KP_*", "KP_Alice"], "KP_Alice")


@pytest.mark.parametrize("value", [None, 1, b"KP_Bob", ["KP_Bob"]])
def test_what_is_no_text_is_in_no_list(value: object) -> None:
    assert value not in RemoteSystemIds(["KP_Bob", "*"])


@given(st.text(max_size=80))
def test_no_text_whatever_breaks_the_rules_otherwise_than_by_a_sentence(text: str) -> None:
    fault = ""
    try:
        RemoteSystemIds([text]).__contains__("KP_Alice")
    except ValueError as error:
        fault = str(error)
    assert not fault or fault.startswith("the remote system id ")
