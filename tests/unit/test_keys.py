"""Facts about keyIds and sizes (draft sections 4.2 and 4.3)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipbus.services.api.entropy import new_key_id
from skipbus.shared.protocol.keys import parse_entropy_size, parse_key_id, parse_key_size


def test_a_new_key_id_has_16_bytes_and_is_never_the_same() -> None:
    made = {new_key_id() for _ in range(1000)}
    assert len(made) == 1000
    assert {len(key_id) for key_id in made} == {16}


@given(st.binary(min_size=16, max_size=64))
def test_a_key_id_is_read_in_any_case(key_id: bytes) -> None:
    assert parse_key_id(key_id.hex()) == parse_key_id(key_id.hex().upper()) == key_id


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0" * 30,
        "0" * 31,
        "0" * 33,
        "0" * 130,
        "g" * 32,
        "0" * 31 + " ",
        " " + "0" * 32,
        "00 " * 16,
        "0" * 32 + "\n",
        "0x" + "0" * 32,
        "\u0660" * 32,  # digits, but not ASCII
        "\udcff" * 32,
        "..%2f" * 8,
    ],
)
def test_what_is_not_16_to_64_bytes_of_hex_is_no_key_id(text: str) -> None:
    with pytest.raises(ValueError, match="keyId"):
        parse_key_id(text)


@pytest.mark.parametrize("text", ["128", "136", "192", "256", "504", "512"])
def test_key_sizes_are_multiples_of_8_from_128_to_512(text: str) -> None:
    assert parse_key_size(text) == int(text)


@pytest.mark.parametrize("text", ["8", "16", "256", "8184", "8192"])
def test_entropy_sizes_are_multiples_of_8_from_8_to_8192(text: str) -> None:
    assert parse_entropy_size(text) == int(text)


BAD_SIZES = ["", "0", "-256", "+256", " 256", "256 ", "256\n", "0256", "256.0", "2_56", "0x100", "1e3", "abc"]
FOREIGN_DIGITS = ["\u0662\u0665\u0666", "\uff12\uff15\uff16", "9" * 5000, "\udcff"]


@pytest.mark.parametrize("text", [*BAD_SIZES, *FOREIGN_DIGITS, "120", "127", "129", "260", "513", "520"])
def test_any_other_key_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"^size must be"):
        parse_key_size(text)


@pytest.mark.parametrize("text", [*BAD_SIZES, *FOREIGN_DIGITS, "4", "7", "9", "8193", "8200", "65536"])
def test_any_other_entropy_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"^minentropy must be"):
        parse_entropy_size(text)


@pytest.mark.parametrize("parse", [parse_key_size, parse_entropy_size, parse_key_id])
@given(text=st.text(max_size=140))
def test_no_text_raises_anything_but_a_value_error(parse: Callable[[str], object], text: str) -> None:
    with contextlib.suppress(ValueError):
        parse(text)
