"""Facts about ``[[peers]]``: what a table may hold, what is refused with which words, and what comes of it."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from skipbus.ctl.__main__ import main
from skipbus.shared.crypto.identity import Identity, fingerprint
from skipbus.shared.settings import ConfigurationError, Secret, Settings, describe, load_settings
from skipbus.shared.settings.peers import PeerSettings, identity_line, parse_identity_line, peer_block

REQUIRED = {
    "SKIP_LOCAL_SYSTEM_ID": "KP_Alice",
    "MYSQL_USER": "skipbus",
    "MYSQL_PASSWORD": "correct-horse-battery",
    "MYSQL_DATABASE": "skipbus",
}
BOB = Identity.generate().public_key
CAROL = Identity.generate().public_key
LINE = identity_line(BOB)
BUS = f'[[peers]]\nsystem_id = "KP_Bob"\nlink = "bus"\nidentity = "{LINE}"\n'
CERTIFICATE = "-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n"


def load(tmp_path: Path, text: str, **environ: str) -> Settings:
    path = tmp_path / "skipbus.toml"
    path.write_text(text)
    return load_settings(REQUIRED | {"SKIP_CONFIG_FILE": str(path)} | environ)


def problems(tmp_path: Path, text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path, text)
    return tuple(problem.removeprefix(f"{tmp_path}/skipbus.toml: ") for problem in caught.value.problems)


def only_problem(tmp_path: Path, text: str) -> str:
    (problem,) = problems(tmp_path, text)
    return problem


# What is read


def test_a_bus_peer_has_its_identity_and_a_stock_of_64(tmp_path: Path) -> None:
    settings = load(tmp_path, BUS)
    assert settings.peers == {"KP_Bob": PeerSettings("KP_Bob", "bus", BOB, stock=64)}
    assert settings.bus_peers == (settings.peers["KP_Bob"],)
    assert settings.link_of("KP_Bob") == "bus"


def test_a_peer_without_a_table_or_without_a_link_is_in_the_same_store(tmp_path: Path) -> None:
    settings = load(tmp_path, '[[peers]]\nsystem_id = "KP_Bob"\n', SKIP_REMOTE_SYSTEM_ID_1="KP_*")
    assert settings.peers["KP_Bob"] == PeerSettings("KP_Bob")
    assert settings.link_of("KP_Bob") == settings.link_of("KP_Carol") == "store"
    assert settings.bus_peers == ()


def test_every_field_of_a_table_is_read(tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_text(CERTIFICATE)
    text = f'{BUS}endpoint = "https://kp.example:8443/"\nendpoint_ca_file = "{authority}"\nstock = 0\nallow = ["r-*"]\n'
    expected = PeerSettings("KP_Bob", "bus", BOB, "https://kp.example:8443", authority, 0, ("r-*",))
    assert load(tmp_path, text).peers == {"KP_Bob": expected}


def test_a_peer_that_no_remote_id_stands_for_joins_the_remote_ids(tmp_path: Path) -> None:
    assert load(tmp_path, BUS).remote_system_ids == ("KP_Bob",)
    assert load(tmp_path, BUS, SKIP_REMOTE_SYSTEM_ID_1="KP_Carol").remote_system_ids == ("KP_Carol", "KP_Bob")
    assert load(tmp_path, BUS, SKIP_REMOTE_SYSTEM_ID_1="KP_*").remote_system_ids == ("KP_*",)


def test_the_identity_may_stand_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "bob.pub"
    file.write_text(f"# KP_Bob, by phone\n\n{LINE}\n")
    file.chmod(0o644)
    assert load(tmp_path, BUS.replace(LINE, str(file))).peers["KP_Bob"].identity == BOB


def test_what_identity_show_prints_is_a_table_that_can_be_pasted(tmp_path: Path) -> None:
    settings = load(tmp_path, peer_block("KP_Bob", BOB) + peer_block('KP "\\"', CAROL))
    assert [(peer.system_id, peer.identity) for peer in settings.bus_peers] == [("KP_Bob", BOB), ('KP "\\"', CAROL)]


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:80", "http://[::1]:80", "http://localhost", "https://a/b"])
def test_an_endpoint_may_be_plain_on_this_host_and_have_a_path(tmp_path: Path, endpoint: str) -> None:
    assert load(tmp_path, f'{BUS}endpoint = "{endpoint}"\n').peers["KP_Bob"].endpoint == endpoint


# Who may ask


def test_without_allow_every_caller_may_ask_and_with_it_only_a_proven_name_that_matches() -> None:
    limited = PeerSettings("KP_Bob", allow=("router-*", "CN=a"))
    assert PeerSettings("KP_Bob").allows(())
    assert limited.allows(["x", "router-7"])
    assert limited.allows(["CN=a"])
    assert not limited.allows(["Router-7", "a router-7", "CN=ab"])
    assert not limited.allows(())
    assert not PeerSettings("KP_Bob", allow=()).allows(["router-7"])


# What is refused


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('link = "amqp"', ("link", 'Write "store" or "bus"')),
        ("stock = -1", ("stock", "0 to 100000")),
        ("stock = 100001", ("stock", "0 to 100000")),
        ("stock = true", ("stock", "whole number")),
        ('stock = "64"', ("stock", "whole number")),
        ('allow = "router"', ("allow", "not a list")),
        ("allow = [1]", ("allow", "not a list")),
        ('allow = [""]', ("allow", "1 to 256")),
        ('endpoint = "kp.example"', ("endpoint", "https://kp.example:8443")),
        ('endpoint = "http://kp.example"', ("endpoint", "TLS")),
        ('endpoint = "http://127.0.0.1.example"', ("endpoint", "TLS")),
        ('endpoint = "https://u:p@kp.example"', ("endpoint", "user")),
        ('endpoint = "https://kp.example?x"', ("endpoint", "query")),
        ('endpoint = "https://kp.example:0"', ("endpoint", "host")),
        ('endpoint = "https://kp.example:x"', ("endpoint", "host")),
        ('endpoint = "https://[kp"', ("endpoint", "host")),
        (f'endpoint = "https://{"a" * 250}"', ("endpoint", "255")),
        ("endpoint = 5", ("endpoint", "text in quotes")),
        ('endpoint_ca_file = "/dev/null"', ("endpoint_ca_file", "regular file")),
        ('endpoint_ca_file = "/nowhere/ca.pem"', ("endpoint_ca_file", "cannot be read")),
        ("sotck = 1", ("sotck", "Did you mean stock?")),
        ("qqqq = 1", ("qqqq", "Remove it")),
    ],
)
def test_a_bad_field_is_one_problem_that_names_peer_field_and_fix(
    tmp_path: Path, line: str, words: tuple[str, ...]
) -> None:
    table = BUS if not line.startswith("link") else BUS.replace('link = "bus"\n', "")
    problem = only_problem(tmp_path, f"{table}{line}\n")
    assert problem.startswith('peer "KP_Bob": ')
    assert all(word in problem for word in words), problem
    assert problem.isprintable()
    assert len(problem) < 400


@pytest.mark.parametrize(
    "identity",
    [
        "mldsa87:",
        "mldsa87:!!!!",
        LINE[:-4],
        f"{LINE}AAAA",
        f"mldsa87:{base64.b64encode(b'x' * 32).decode()}",
        "mldsa65:AAAA",
        "/nowhere/bob.pub",
        "/dev/zero",
        "a\\u0000b",
    ],
    ids=range(9),
)
def test_an_identity_that_is_no_whole_public_key_is_refused_with_how_to_get_it(tmp_path: Path, identity: str) -> None:
    problem = only_problem(tmp_path, BUS.replace(LINE, identity))
    assert problem.startswith('peer "KP_Bob": identity: ')
    assert "skipctl identity show" in problem
    assert len(problem) < 400


def test_an_identity_file_that_everybody_can_write_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bob.pub"
    file.write_text(LINE)
    file.chmod(0o666)
    assert "chmod o-w" in only_problem(tmp_path, BUS.replace(LINE, str(file)))


def test_an_identity_file_of_two_lines_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bob.pub"
    file.write_text(f"{LINE}\n{LINE}\n")
    assert "one line" in only_problem(tmp_path, BUS.replace(LINE, str(file)))


def test_keys_go_over_a_bus_only_to_a_configured_identity(tmp_path: Path) -> None:
    assert "identity is missing" in only_problem(tmp_path, '[[peers]]\nsystem_id = "KP_Bob"\nlink = "bus"\n')


def test_a_store_peer_has_no_stock_and_an_authority_needs_an_endpoint(tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_text(CERTIFICATE)
    found = problems(tmp_path, f'[[peers]]\nsystem_id = "KP_Bob"\nstock = 5\nendpoint_ca_file = "{authority}"\n')
    assert ["stock has no meaning" in found[0], "endpoint_ca_file has no meaning" in found[1]] == [True, True]


@pytest.mark.parametrize("system_id", ["KP_*", "", "KP_\\u00e9", "a" * 65])
def test_a_peer_is_one_key_provider_and_no_glob(tmp_path: Path, system_id: str) -> None:
    assert "system_id: " in only_problem(tmp_path, BUS.replace("KP_Bob", system_id))


def test_a_table_without_an_id_is_named_by_its_number(tmp_path: Path) -> None:
    problem = only_problem(tmp_path, BUS + '[[peers]]\nlink = "store"\n')
    assert problem == "[[peers]] number 2: system_id is missing. Write the other key provider's exact id."


def test_the_own_id_a_second_table_and_a_shared_identity_are_refused(tmp_path: Path) -> None:
    own, again = BUS.replace("KP_Bob", "KP_Alice").replace(LINE, identity_line(CAROL)), BUS
    twin = BUS.replace("KP_Bob", "KP_Carol")
    found = problems(tmp_path, BUS + own + again + twin)
    assert len(found) == 3
    assert found[0].startswith('peer "KP_Alice": this is the key provider\'s own id')
    assert "a table of this system_id already" in found[1]
    assert found[2].startswith('peer "KP_Carol": identity is that of KP_Bob too')


@pytest.mark.parametrize("text", ['[peers]\nsystem_id = "KP_Bob"\n', "peers = 5\n", "peers = [1]\n", "[peers]\n"])
def test_what_is_no_list_of_tables_is_told_how_to_be_one(tmp_path: Path, text: str) -> None:
    (first, *_) = problems(tmp_path, text)
    assert "Write [[peers]], with two brackets" in first


def test_all_problems_of_all_tables_are_told_together(tmp_path: Path) -> None:
    text = '[[peers]]\nsystem_id = "A"\nlink = "bus"\nstock = -1\n[[peers]]\nsystem_id = "B*"\nallow = 1\nx = 2\n'
    assert len(problems(tmp_path, text + "[api]\nport = 0\n")) == 6


def test_a_key_that_is_none_raises_and_one_that_is_comes_back() -> None:
    assert parse_identity_line(identity_line(CAROL)) == CAROL
    with pytest.raises(ValueError, match="ML-DSA-87"):
        parse_identity_line("mldsa87:AAAA")


# What is shown


def test_config_check_shows_each_peer_with_the_fingerprint_of_its_identity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f'{BUS}endpoint = "https://kp.example"\nallow = []\n[[peers]]\nsystem_id = "KP_Carol"\n'
    shown = {name: value for name, value, _ in describe(load(tmp_path, text, SKIP_REMOTE_SYSTEM_ID_1="KP_C*"))}
    bob = f"link bus; identity {fingerprint(BOB)}; endpoint https://kp.example; stock 64; allow nobody"
    assert shown['peers."KP_Bob"'] == bob
    assert shown['peers."KP_Carol"'] == "link store; identity learned"
    assert shown["SKIP_REMOTE_SYSTEM_ID_1"] == "KP_C*"
    assert main(["config", "check"], REQUIRED | {"SKIP_CONFIG_FILE": str(tmp_path / "skipbus.toml")}) == 0
    assert bob in capsys.readouterr().out


def test_no_whole_public_key_stands_in_the_repr_of_the_settings(tmp_path: Path) -> None:
    text = repr(load(tmp_path, BUS))
    assert LINE not in text
    assert repr(BOB)[2:40] not in text
    assert repr(Secret("x")) in text
