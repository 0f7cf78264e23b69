"""What sites hand to each other: it is read back as it was written, and anything else is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from skipbus.ctl.cert import make_broker_certificate
from skipbus.ctl.handover import Handover, parse_broker, read_handover
from skipbus.shared.crypto.identity import Identity
from skipbus.shared.errors import OperatorError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Handover:
    folder = tmp_path_factory.mktemp("broker")
    make_broker_certificate(folder / "authority", folder, "skip.paris.example")
    return Handover(
        sender="KP Paris",
        receiver="KP_Oslo",
        identity=Identity.generate().public_key,
        broker=("skip.paris.example", 5671),
        account="federation.KP_Oslo",
        password="a" * 48,
        authority=(folder / "authority" / "ca.pem").read_text(),
    )


def test_a_hand_over_is_read_as_it_was_written(made: Handover, tmp_path: Path) -> None:
    (tmp_path / made.file_name).write_text(made.text())
    assert made.file_name == "KP:20Paris-to-KP_Oslo.toml"
    assert read_handover(tmp_path / made.file_name) == made


def test_a_hand_over_shows_its_password_in_the_file_alone(made: Handover) -> None:
    assert made.password in made.text()
    assert made.password not in repr(made)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("account", "site_syncer"),
        ("account", "federation.KP_Rome"),
        ("password", "short"),
        ("password", "x" * 40 + "@host/"),
        ("sender", "KP_*"),
        ("receiver", ""),
        ("broker", ("skip.paris.example/?verify=verify_none", 5671)),
        ("broker", ("skip.paris.example", 70000)),
        ("identity", b"short"),
        ("authority", "nothing"),
    ],
)
def test_a_hand_over_that_says_more_than_it_may_is_refused(
    made: Handover,
    name: str,
    value: Any,  # noqa: ANN401 -- wrong on purpose, and of any type
    tmp_path: Path,
) -> None:
    file = tmp_path / "handover.toml"
    file.write_text(dataclasses.replace(made, **{name: value}).text())
    with pytest.raises(OperatorError):
        read_handover(file)


def test_a_certificate_of_a_server_is_no_authority(made: Handover, tmp_path: Path) -> None:
    make_broker_certificate(tmp_path / "authority", tmp_path, "skip.paris.example")
    file = tmp_path / "handover.toml"
    file.write_text(dataclasses.replace(made, authority=(tmp_path / "broker.pem").read_text()).text())
    with pytest.raises(OperatorError, match="no authority"):
        read_handover(file)


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: text + 'more = "x"\n'])
def test_a_hand_over_that_is_cut_short_or_has_an_unknown_field_is_refused(
    made: Handover, damage: object, tmp_path: Path
) -> None:
    file = tmp_path / "handover.toml"
    assert callable(damage)
    file.write_text(damage(made.text()))
    with pytest.raises(OperatorError, match="not a whole hand-over"):
        read_handover(file)


NOT_BROKERS = ["", "host:", "host:0", "host:65536", "-host", "a b", "192.0.2.1", "user@host", "host/"]


@pytest.mark.parametrize("text", NOT_BROKERS)
def test_a_broker_that_cannot_be_reached_by_a_name_is_refused(text: str) -> None:
    with pytest.raises(OperatorError, match="HOST is a name"):
        parse_broker(text)


def test_a_broker_has_the_port_of_amqps_unless_another_one_is_named() -> None:
    assert parse_broker("skip.paris.example") == ("skip.paris.example", 5671)
    assert parse_broker("skip.paris.example:5000") == ("skip.paris.example", 5000)
