"""Facts about the configuration: what is read, from where, what is refused, and what is never shown."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path

import orjson
import pytest

from skipbus.shared.settings import (
    ConfigurationError,
    Secret,
    Settings,
    config_from_argv,
    describe,
    load_settings,
    load_settings_or_exit,
)
from skipbus.shared.settings.model import OPTIONS, Option, known_names
from skipbus.shared.settings.values import split_urls

PASSWORD = "correct-horse-battery"
REQUIRED = {
    "SKIP_LOCAL_SYSTEM_ID": "KP_Alice",
    "SKIP_REMOTE_SYSTEM_ID_1": "KP_Bob",
    "MYSQL_USER": "skipbus",
    "MYSQL_PASSWORD": PASSWORD,
    "MYSQL_DATABASE": "skipbus",
}
PUBLIC_OPTIONS = [option for option in OPTIONS if not option.secret]


def load(**environ: str) -> Settings:
    return load_settings(REQUIRED | environ)


def without(*names: str, **environ: str) -> dict[str, str]:
    return {name: value for name, value in (REQUIRED | environ).items() if name not in names}


def problems_of(environ: Mapping[str, str]) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(environ)
    return caught.value.problems


def only_problem(**environ: str) -> str:
    problems = problems_of(REQUIRED | environ)
    assert len(problems) == 1, problems
    return problems[0]


def private_file(path: Path, text: str | bytes, mode: int = 0o600) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return str(path)


# What is read


def test_required_variables_alone_give_the_documented_defaults() -> None:
    settings = load()
    expected = {
        "environment": "production",
        "debug": False,
        "local_system_id": "KP_Alice",
        "remote_system_ids": ("KP_Bob",),
        "mysql.host": "127.0.0.1",
        "mysql.port": 3306,
        "mysql.user": "skipbus",
        "mysql.password": Secret(PASSWORD),
        "mysql.database": "skipbus",
        "rabbitmq_url": Secret("amqp://guest:guest@127.0.0.1:5672/"),
        "keyring_dir": Path("/var/lib/skipbus/keyring"),
        "key_ttl_seconds": 3600,
        "epoch_seconds": 600,
        "host": "127.0.0.1",
        "port": 8080,
        "api_workers": 1,
        "heartbeat_seconds": 5.0,
        "request_timeout_seconds": 5.0,
        "header_timeout_seconds": 10.0,
        "keepalive_seconds": 75.0,
        "max_connections": 20000,
        "max_batch": 256,
        "max_queue": 4096,
        "sync_timeout_seconds": 2.0,
        "retrieve_wait_seconds": 1.0,
        "peers": {},
        "bus_peers": (),
        "metrics_port": 0,
        "log_level": "info",
        "config_file": None,
    }
    assert {name: attrgetter(name)(settings) for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("SKIP_ENV", "development", "environment", "development"),
        ("SKIP_LOCAL_SYSTEM_ID", "KP QuIIN 1", "local_system_id", "KP QuIIN 1"),
        ("MYSQL_HOST", "db.example.org", "mysql.host", "db.example.org"),
        ("MYSQL_HOST", "2001:db8::1", "mysql.host", "2001:db8::1"),
        ("MYSQL_HOST", "db1,db2:3307", "mysql.host", "db1,db2:3307"),
        ("MYSQL_HOST", "[2001:db8::1]:3307", "mysql.host", "[2001:db8::1]:3307"),
        ("MYSQL_PORT", "3307", "mysql.port", 3307),
        ("MYSQL_USER", "alice@site", "mysql.user", "alice@site"),
        ("MYSQL_PASSWORD", " p w ", "mysql.password", Secret(" p w ")),
        ("MYSQL_DATABASE", "my_database-1", "mysql.database", "my_database-1"),
        ("RABBITMQ_URL", "amqps://u:p@h/v", "rabbitmq_url", Secret("amqps://u:p@h/v")),
        ("SKIP_KEYRING_DIR", "/srv/keys", "keyring_dir", Path("/srv/keys")),
        ("SKIP_KEY_TTL_SECONDS", "60", "key_ttl_seconds", 60),
        ("SKIP_EPOCH_SECONDS", "30", "epoch_seconds", 30),
        ("SKIP_HOST", "0.0.0.0", "host", "0.0.0.0"),  # noqa: S104 -- a value to be parsed
        ("SKIP_PORT", "8443", "port", 8443),
        ("SKIP_API_WORKERS", "4", "api_workers", 4),
        ("SKIP_REQUEST_TIMEOUT_SECONDS", "2.5", "request_timeout_seconds", 2.5),
        ("SKIP_HEADER_TIMEOUT_SECONDS", "3", "header_timeout_seconds", 3.0),
        ("SKIP_KEEPALIVE_SECONDS", "15", "keepalive_seconds", 15.0),
        ("SKIP_MAX_CONNECTIONS", "100", "max_connections", 100),
        ("SKIP_MAX_BATCH", "16", "max_batch", 16),
        ("SKIP_MAX_QUEUE", "1000", "max_queue", 1000),
        ("SKIP_HEARTBEAT_SECONDS", "0.5", "heartbeat_seconds", 0.5),
        ("SKIP_METRICS_PORT", "9100", "metrics_port", 9100),
        ("SKIP_LOG_LEVEL", "WARNING", "log_level", "warning"),
    ],
)
def test_each_variable_sets_its_field(name: str, text: str, field: str, value: object) -> None:
    assert attrgetter(field)(load(**{name: text})) == value


def test_each_number_is_of_the_type_that_its_field_has() -> None:
    settings = load(SKIP_HEARTBEAT_SECONDS="3", SKIP_PORT="81")
    assert type(settings.heartbeat_seconds) is float
    assert type(settings.port) is int


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().port = 1  # type: ignore[misc]


def test_nothing_is_read_from_the_environment_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIP_PORT", "9999")
    assert load().port == 8080


@pytest.mark.parametrize("text", ["true", "1", "yes", "True", "YES"])
def test_debug_is_switched_on_by_each_word_for_yes_and_means_log_level_debug(text: str) -> None:
    settings = load(SKIP_DEBUG=text, SKIP_LOG_LEVEL="error")
    assert (settings.debug, settings.log_level) == (True, "debug")


@pytest.mark.parametrize("text", ["false", "0", "no", "False"])
def test_debug_is_switched_off_by_each_word_for_no(text: str) -> None:
    settings = load(SKIP_DEBUG=text, SKIP_LOG_LEVEL="error")
    assert (settings.debug, settings.log_level) == (False, "error")


def test_the_earlier_servers_flask_env_is_read_where_skip_env_is_absent() -> None:
    assert load(FLASK_ENV="development").environment == "development"


def test_skip_env_wins_over_flask_env() -> None:
    assert load(FLASK_ENV="anything", SKIP_ENV="production").environment == "production"


def test_a_bad_flask_env_is_reported_under_its_own_name() -> None:
    assert only_problem(FLASK_ENV="staging").startswith("FLASK_ENV is 'staging'")


def test_remote_ids_keep_the_order_of_their_numbers_across_gaps() -> None:
    remotes = {f"SKIP_REMOTE_SYSTEM_ID_{n}": f"KP_{n}" for n in (10, 2, 31)}
    assert load(**remotes).remote_system_ids == ("KP_Bob", "KP_2", "KP_10", "KP_31")


def test_remote_ids_may_be_globs_and_may_leave_out_number_one() -> None:
    environ = without("SKIP_REMOTE_SYSTEM_ID_1", SKIP_REMOTE_SYSTEM_ID_3="KP_[!x]*?")
    assert load_settings(environ).remote_system_ids == ("KP_[!x]*?",)


def test_a_lone_key_provider_may_list_its_own_id_as_remote() -> None:
    assert load(SKIP_REMOTE_SYSTEM_ID_2="KP_Alice").remote_system_ids == ("KP_Bob", "KP_Alice")


def test_a_relative_keyring_folder_is_fixed_to_the_working_directory_of_the_start() -> None:
    assert load(SKIP_KEYRING_DIR="keys").keyring_dir == Path.cwd() / "keys"


def test_mysql_variables_of_compose_users_and_foreign_variables_are_ignored() -> None:
    load(MYSQL_ROOT_PASSWORD="x", MYSQL_ALLOW_EMPTY_PASSWORD="yes", PATH="/bin", RABBITMQ_NODENAME="r")


# What is refused

BAD_VALUES = {
    "SKIP_ENV": ["prod", "production "],
    "SKIP_DEBUG": ["maybe", "2"],
    "SKIP_LOCAL_SYSTEM_ID": ["KP_*", "KP\nAlice", "KP_é", "x" * 65, " KP"],
    "SKIP_REMOTE_SYSTEM_ID_1": ["KP_[", "KP\x00", "é", "x" * 65, ""],
    "MYSQL_HOST": ["db:", "db:0", "db:3306:1", "db host", "-db", "[::1", "db,,db2", "db,db", "db:x"],
    "MYSQL_PORT": ["0", "65536", "3306.0"],
    "MYSQL_USER": ["u" * 81, "a\tb"],
    "MYSQL_DATABASE": ["a`b", "a b", "d" * 65, "a.b"],
    "MYSQL_PASSWORD": ["a\udc80b"],
    "RABBITMQ_URL": [
        "http://h/",
        "amqp:///",
        "amqp://u:p@h:x/",
        "amqp://h:0/",
        "amqp://h:99999/",
        "guest",
        "amqp://h/ ",
        "amqp://[h/",
    ],
    "SKIP_KEYRING_DIR": ["~/keys"],
    "SKIP_KEY_TTL_SECONDS": ["0", "604801", "1h", "60.5"],
    "SKIP_EPOCH_SECONDS": ["1", "86401", "-600"],
    "SKIP_HOST": ["0.0.0.0:80", "", "ho st"],
    "SKIP_PORT": ["0", "65536", "http", "\uff18\uff10", "8_0", " 80", "+80", "9" * 5000],
    "SKIP_ALLOW_PLAINTEXT": ["2", "maybe"],
    "SKIP_TLS_PORT": ["0", "65536", "https"],
    "SKIP_TLS_CERT_FILE": ["a.pem,b.pem,c.pem", ",", "~/a.pem"],
    "SKIP_TLS_KEY_FILE": ["a.key,b.key,c.key", "a\x00"],
    "SKIP_TLS_CLIENT_CA_FILE": ["a.pem,b.pem", "~/ca.pem"],
    "SKIP_TLS_PSK_FILE": ["a,b", "~/psk.txt"],
    "SKIP_TLS_HANDSHAKE_TIMEOUT_SECONDS": ["0", "301"],
    "SKIP_MAX_CONNECTIONS_PER_ADDRESS": ["0", "1000001"],
    "SKIP_API_WORKERS": ["0", "65"],
    "SKIP_REQUEST_TIMEOUT_SECONDS": ["0", "301", "nan"],
    "SKIP_HEADER_TIMEOUT_SECONDS": ["0.05", "inf"],
    "SKIP_KEEPALIVE_SECONDS": ["0", "3601"],
    "SKIP_MAX_CONNECTIONS": ["0", "1000001"],
    "SKIP_MAX_BATCH": ["0", "4097"],
    "SKIP_MAX_QUEUE": ["0", "1000001"],
    "SKIP_HEARTBEAT_SECONDS": ["0", "3601", "1e1", "5s"],
    "SKIP_SYNC_TIMEOUT": ["0", "301", "2s"],
    "SKIP_RETRIEVE_WAIT": ["-1", "61", "never"],
    "SKIP_METRICS_PORT": ["65536", "on"],
    "SKIP_LOG_LEVEL": ["trace"],
}


def test_each_option_has_bad_values_in_these_tests() -> None:
    assert {option.variable for option in OPTIONS} <= BAD_VALUES.keys()


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in BAD_VALUES.items() for text in texts], ids=ascii
)
def test_a_bad_value_is_one_short_printable_problem_that_names_the_variable_and_the_fix(name: str, text: str) -> None:
    problem = only_problem(**{name: text})
    assert problem.startswith(f"{name} is ")
    assert ". Set " in problem
    assert problem.isascii()
    assert problem.isprintable()
    assert len(problem) < 400


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_a_missing_required_variable_is_named_with_the_fix(name: str) -> None:
    (problem,) = problems_of(without(name))
    assert problem.startswith(f"{name} is missing. Set ")


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.variable)
def test_an_empty_variable_is_refused_and_not_taken_for_an_absent_one(option: Option) -> None:
    assert only_problem(**{option.variable: ""}).startswith(f"{option.variable} is empty. Set it")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("SKIP_PROT", "SKIP_PORT"),
        ("SKIP_TLL_SECONDS", "SKIP_KEY_TTL_SECONDS"),
        ("SKIP_KEYRING", "SKIP_KEYRING_DIR"),
        ("SKIP_TIMEOUT_SYNC", "SKIP_SYNC_TIMEOUT"),
        ("SKIP_TLS_CERT", "SKIP_TLS_CERT_FILE"),
        ("SKIP_KEY_TTL", "SKIP_KEY_TTL_SECONDS"),
        ("SKIP_REMOTE_SYSTEM_ID", "SKIP_REMOTE_SYSTEM_ID_1"),
        ("SKIP_REMOTE_SYSTEM_ID_0", "SKIP_REMOTE_SYSTEM_ID_1"),
        ("SKIP_REMOTE_SYSTEM_ID_01", "SKIP_REMOTE_SYSTEM_ID_1"),
        ("SKIP_CONFIG", "SKIP_CONFIG_FILE"),
    ],
)
def test_an_unknown_skip_name_is_refused_with_the_nearest_known_one(name: str, nearest: str) -> None:
    problem = only_problem(**{name: "secret-value"})
    assert problem == f"{name} is not a known variable. Did you mean {nearest}?"


def test_an_unknown_skip_name_that_is_like_no_other_is_to_be_removed() -> None:
    assert only_problem(SKIP_QQQQQQQQ="1") == "SKIP_QQQQQQQQ is not a known variable. Remove it."


def test_each_known_name_is_accepted_as_known() -> None:
    problems = problems_of(dict.fromkeys(known_names(), ""))
    assert not [problem for problem in problems if "not a known variable" in problem]


def test_a_remote_id_that_is_given_twice_is_refused_with_both_names() -> None:
    problem = only_problem(SKIP_REMOTE_SYSTEM_ID_5="KP_Bob")
    assert problem.startswith("SKIP_REMOTE_SYSTEM_ID_5 is 'KP_Bob', as SKIP_REMOTE_SYSTEM_ID_1 is. Remove")


def test_all_problems_of_all_sources_are_reported_together(tmp_path: Path) -> None:
    config = tmp_path / "skipbus.toml"
    config.write_text('log.level = 3\n[keys]\nttl = 1\n[mysql]\npassword = "x"\n')
    problems = problems_of(
        {
            "SKIP_CONFIG_FILE": str(config),
            "SKIP_PROT": "1",
            "SKIP_PORT": "x",
            "SKIP_REMOTE_SYSTEM_ID_1": "[",
            "MYSQL_USER": "u",
            "MYSQL_DATABASE": "d",
            "MYSQL_PASSWORD_FILE": str(tmp_path / "absent"),
            "SKIP_MAX_BATCH": "100",
            "SKIP_MAX_QUEUE": "10",
        }
    )
    beginnings = (
        "SKIP_PROT is not",
        f"{config}: keys.ttl is not",
        f"{config}: mysql.password is a secret",
        "SKIP_LOCAL_SYSTEM_ID is missing",
        "MYSQL_PASSWORD_FILE: ",
        "SKIP_PORT is 'x'",
        f"{config}: log.level has the wrong type",
        "SKIP_REMOTE_SYSTEM_ID_1 is '['",
        "SKIP_MAX_QUEUE is 10",
    )
    assert len(problems) == len(beginnings)
    for beginning in beginnings:
        assert any(problem.startswith(beginning) for problem in problems), beginning


def test_an_epoch_that_makes_too_many_of_them_in_a_keys_lifetime_is_refused() -> None:
    problem = only_problem(SKIP_KEY_TTL_SECONDS="604800", SKIP_EPOCH_SECONDS="10")
    assert problem.endswith("Set it to 296 or more.")
    assert load(SKIP_KEY_TTL_SECONDS="604800", SKIP_EPOCH_SECONDS="296").epoch_seconds == 296


@pytest.mark.parametrize(("metrics", "workers"), [("8080", "1"), ("8078", "3"), ("65530", "10")])
def test_metrics_ports_that_meet_the_apis_port_or_the_last_port_are_refused(metrics: str, workers: str) -> None:
    assert only_problem(SKIP_METRICS_PORT=metrics, SKIP_API_WORKERS=workers).startswith("SKIP_METRICS_PORT ")


def test_metrics_ports_beside_the_apis_port_are_accepted() -> None:
    assert load(SKIP_METRICS_PORT="8077", SKIP_API_WORKERS="3").metrics_port == 8077
    assert load(SKIP_METRICS_PORT="8081", SKIP_API_WORKERS="3").metrics_port == 8081


# Secrets and their files


def test_a_secret_is_read_from_the_file_that_its_file_variable_names(tmp_path: Path) -> None:
    environ = without(
        "MYSQL_PASSWORD",
        MYSQL_PASSWORD_FILE=private_file(tmp_path / "p", "from file\n"),
        RABBITMQ_URL_FILE=private_file(tmp_path / "r", "amqp://u:p@h/\n"),
    )
    settings = load_settings(environ)
    assert settings.mysql.password.reveal() == "from file"
    assert settings.rabbitmq_url.reveal() == "amqp://u:p@h/"
    assert settings.names_broker


def test_a_process_without_a_broker_url_of_its_own_names_no_broker() -> None:
    assert not load().names_broker
    assert load(RABBITMQ_URL="amqp://guest:guest@127.0.0.1:5672/").names_broker


@pytest.mark.parametrize(
    ("content", "secret"), [("p", "p"), ("p\n", "p"), ("p\r\n", "p"), (" p \n", " p "), ("p\n\n", "p\n")]
)
def test_exactly_one_line_end_is_taken_off_a_secret_file(tmp_path: Path, content: str, secret: str) -> None:
    environ = without("MYSQL_PASSWORD", MYSQL_PASSWORD_FILE=private_file(tmp_path / "p", content))
    assert load_settings(environ).mysql.password.reveal() == secret


@pytest.mark.parametrize("name", ["MYSQL_PASSWORD", "RABBITMQ_URL"])
def test_a_secret_that_is_given_both_ways_is_refused(tmp_path: Path, name: str) -> None:
    both = {name: "amqp://h/", f"{name}_FILE": private_file(tmp_path / "p", "amqp://h/")}
    assert only_problem(**both) == f"{name} and {name}_FILE are both set. Remove one of them."


def make_missing(path: Path) -> str:
    return str(path)


def make_empty(path: Path) -> str:
    return private_file(path, "\n")


def make_world_readable(path: Path) -> str:
    return private_file(path, "hidden-password", 0o604)


def make_world_writable(path: Path) -> str:
    return private_file(path, "hidden-password", 0o602)


def make_binary(path: Path) -> str:
    return private_file(path, b"hidden-password\xff")


def make_huge(path: Path) -> str:
    return private_file(path, "hidden-password" * 100_000)


def make_folder(path: Path) -> str:
    path.mkdir(mode=0o700)
    return str(path)


def make_fifo(path: Path) -> str:
    os.mkfifo(path, 0o600)
    return str(path)


@pytest.mark.parametrize("environment", ["production", "development"])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (make_missing, "cannot be read"),
        (make_empty, "is empty"),
        (make_world_readable, "is open to every user"),
        (make_world_writable, "is open to every user"),
        (make_binary, "is not UTF-8"),
        (make_huge, "is larger than 1 MiB"),
        (make_folder, "is not a regular file"),
        (make_fifo, "is not a regular file"),
    ],
)
def test_a_secret_file_that_cannot_be_trusted_is_refused_without_its_content(
    open_folder: Path, make: Callable[[Path], str], says: str, environment: str
) -> None:
    path = make(open_folder / "p")
    environ = without("MYSQL_PASSWORD", MYSQL_PASSWORD_FILE=path, SKIP_ENV=environment)
    (problem,) = problems_of(environ)
    assert problem.startswith(f"MYSQL_PASSWORD_FILE: '{path}' {says}")
    assert "hidden" not in problem


@pytest.mark.parametrize(
    "text",
    [
        "http://u:hidden-password@h/",
        "amqp://u:hidden-password@[h/",
        "amqp://u:hidden-password@h:99999/",
        "amqp://h:hidden-password",
    ],
)
def test_a_bad_url_is_refused_without_the_password_in_it(text: str) -> None:
    assert "hidden" not in only_problem(RABBITMQ_URL=text)
    with pytest.raises(ConfigurationError) as caught:
        load(RABBITMQ_URL=text)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("show", [repr, str, "{}".format, "{!r:>5}".format, "%s".__mod__, ascii])
def test_a_secret_shows_as_stars(show: Callable[[object], str]) -> None:
    assert show(Secret(PASSWORD)).strip() == "***"


def test_settings_show_no_secret() -> None:
    settings = load(RABBITMQ_URL=f"amqp://u:{PASSWORD}@h/")
    shown = f"{settings!r} {settings} {settings.mysql} {dataclasses.asdict(settings)} {describe(settings)}"
    assert PASSWORD not in shown
    assert shown.count("***") >= 8


@pytest.mark.parametrize("dump", [pickle.dumps, orjson.dumps])
def test_a_secret_cannot_be_serialised(dump: Callable[[object], bytes]) -> None:
    with pytest.raises(TypeError):
        dump(Secret(PASSWORD))


def test_settings_cannot_be_pickled_with_their_secrets() -> None:
    with pytest.raises(TypeError):
        pickle.dumps(load().mysql)


def test_secrets_compare_by_text_and_stay_secrets_when_copied() -> None:
    secret = Secret("ä")
    assert secret == Secret("ä")
    assert secret != Secret("b")
    assert secret != "ä"
    assert hash(secret) == hash(Secret("ä"))
    assert copy.deepcopy(secret) is copy.copy(secret) is secret


def test_a_secret_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Secret("a")._text = "b"


# The TOML file

WHOLE_FILE = """
environment = "development"
debug = false
local_system_id = "KP_Toml"
remote_system_ids = ["KP_Bob", "KP_*"]
[mysql]
host = "db"
port = 3307
user = "toml"
database = "toml_db"
[keyring]
dir = "/srv/toml"
[keys]
ttl_seconds = 100
epoch_seconds = 20
[api]
host = "::1"
port = 81
allow_plaintext = true
workers = 2
request_timeout_seconds = 1
header_timeout_seconds = 2.5
keepalive_seconds = 3
max_connections = 4
max_batch = 5
max_queue = 6
[tls]
port = 444
cert_file = "/srv/rsa.pem,/srv/ecdsa.pem"
key_file = "/srv/rsa.key,/srv/ecdsa.key"
client_ca_file = "/srv/ca.pem"
psk_file = "/srv/psk.txt"
handshake_timeout_seconds = 1.5
max_connections_per_address = 7
[syncer]
heartbeat_seconds = 0.5
[sync]
timeout_seconds = 1.5
retrieve_wait_seconds = 0
[metrics]
port = 9
[log]
level = "error"
"""


def load_toml(tmp_path: Path, text: str, **environ: str) -> Settings:
    path = tmp_path / "skipbus.toml"
    path.write_text(text)
    needed = {name: value for name, value in REQUIRED.items() if name == "MYSQL_PASSWORD"}
    return load_settings(needed | {"SKIP_CONFIG_FILE": str(path)} | environ)


def toml_problem(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_toml(tmp_path, text, **REQUIRED)
    (problem,) = caught.value.problems
    return problem.removeprefix(f"{tmp_path}/skipbus.toml: ")


def test_every_option_but_the_secrets_can_stand_in_the_toml_file(tmp_path: Path) -> None:
    settings = load_toml(tmp_path, WHOLE_FILE)
    origins = {name: origin for name, _, origin in describe(settings)}
    public = [option.variable for option in PUBLIC_OPTIONS] + [
        "SKIP_REMOTE_SYSTEM_ID_1",
        "SKIP_REMOTE_SYSTEM_ID_2",
    ]
    assert {origins[name] for name in public} == {f"TOML {tmp_path}/skipbus.toml"}
    assert settings.remote_system_ids == ("KP_Bob", "KP_*")
    assert (settings.environment, settings.mysql.port, settings.heartbeat_seconds) == (
        "development",
        3307,
        0.5,
    )
    assert (settings.request_timeout_seconds, settings.header_timeout_seconds) == (1.0, 2.5)


def test_the_environment_wins_over_the_toml_file(tmp_path: Path) -> None:
    settings = load_toml(tmp_path, WHOLE_FILE, SKIP_PORT="82", SKIP_REMOTE_SYSTEM_ID_4="KP_Env")
    assert (settings.port, settings.remote_system_ids) == (82, ("KP_Env",))
    assert settings.mysql.user == "toml"


def test_flask_env_wins_over_the_toml_file_too(tmp_path: Path) -> None:
    assert load_toml(tmp_path, WHOLE_FILE, FLASK_ENV="production").environment == "production"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[keys]\nttl_second = 1", "keys.ttl_second is not a known key. Did you mean keys.ttl_seconds?"),
        ("[keyz]\nttl_seconds = 1", "keyz.ttl_seconds is not a known key. Did you mean keys.ttl_seconds?"),
        ("[keyz]", "keyz is not a known key."),
        ("mysql = 1", "mysql is not a known key."),
        ("[api.port]\nx = 1", "api.port.x is not a known key. Did you mean api.port?"),
        ("qqqqqqqqqqqq = 1", "qqqqqqqqqqqq is not a known key. Remove it."),
        ('"\\u001b[31m" = 1', "\\x1b[31m is not a known key. Remove it."),
        (
            '[mysql]\npassword = "hidden"',
            "mysql.password is a secret. Remove it from this file and set MYSQL_PASSWORD_FILE.",
        ),
        (
            '[rabbitmq]\nurl = "hidden"',
            "rabbitmq.url is a secret. Remove it from this file and set RABBITMQ_URL_FILE.",
        ),
        ('[api]\nport = "81"', "api.port has the wrong type. Write it as a number without quotes."),
        ("[api]\nport = true", "api.port has the wrong type. Write it as a number without quotes."),
        ("[api]\nport = 8.5", "api.port has the wrong type. Write it as a number without quotes."),
        ("[api]\nport = 0", "api.port is '0': it is not a whole number from 1 to 65535. Set it to"),
        ("[log]\nlevel = 1", "log.level has the wrong type. Write it as a text in quotes."),
        ('debug = "true"', "debug has the wrong type. Write it as true or false."),
        ("[syncer]\nheartbeat_seconds = nan", "syncer.heartbeat_seconds is 'nan': it is not a number"),
    ],
)
def test_a_fault_in_the_toml_file_is_named_with_its_place(tmp_path: Path, text: str, problem: str) -> None:
    found = toml_problem(tmp_path, text)
    assert found.startswith(problem)
    assert "hidden" not in found


def test_an_empty_table_of_the_toml_file_is_fine(tmp_path: Path) -> None:
    assert load_toml(tmp_path, "[keys]\n[api]\n", **REQUIRED).port == 8080


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ('"KP_Bob"', "remote_system_ids is not a list"),
        ("[1]", "remote_system_ids has the wrong type"),
        ('["KP_Bob", "KP_Bob"]', "remote_system_ids is 'KP_Bob', as "),
        ('["KP_["]', "remote_system_ids is 'KP_[': "),
        ("[]", "SKIP_REMOTE_SYSTEM_ID_1 is missing"),
    ],
)
def test_a_bad_list_of_remote_ids_in_the_toml_file_is_refused(tmp_path: Path, value: str, says: str) -> None:
    path = tmp_path / "skipbus.toml"
    path.write_text(f"remote_system_ids = {value}")
    (problem,) = problems_of(without("SKIP_REMOTE_SYSTEM_ID_1", SKIP_CONFIG_FILE=str(path)))
    assert problem.removeprefix(f"{path}: ").startswith(says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a = = 1", "is not TOML: "),
        (b"a = '\xff'", "is not UTF-8"),
        (b"#" * (1 << 21), "is larger than 1 MiB"),
    ],
)
def test_a_toml_file_that_is_none_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = private_file(tmp_path / "skipbus.toml", content)
    assert only_problem(SKIP_CONFIG_FILE=path).startswith(f"SKIP_CONFIG_FILE: '{path}' {says}")


def test_a_toml_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "absent.toml"
    assert only_problem(SKIP_CONFIG_FILE=str(path)).startswith(f"SKIP_CONFIG_FILE: '{path}' cannot be read (No such")


def test_an_empty_name_of_the_toml_file_is_refused() -> None:
    assert only_problem(SKIP_CONFIG_FILE="") == "SKIP_CONFIG_FILE is empty. Set it to a TOML file, or remove it."


# What is shown


def test_describe_tells_each_option_with_its_value_and_origin(tmp_path: Path) -> None:
    path = private_file(tmp_path / "p", PASSWORD)
    toml = tmp_path / "skipbus.toml"
    toml.write_text("[api]\nport = 81\n")
    environ = without(
        "MYSQL_PASSWORD",
        MYSQL_PASSWORD_FILE=path,
        FLASK_ENV="development",
        SKIP_DEBUG="yes",
        SKIP_REMOTE_SYSTEM_ID_9="KP_*",
        SKIP_CONFIG_FILE=str(toml),
    )
    lines = describe(load_settings(environ))
    assert {option.variable for option in OPTIONS} < {name for name, _, _ in lines}
    for line in (
        ("SKIP_CONFIG_FILE", str(toml), "environment"),
        ("SKIP_ENV", "development", "environment (FLASK_ENV)"),
        ("SKIP_DEBUG", "true", "environment"),
        ("SKIP_LOG_LEVEL", "debug", "SKIP_DEBUG"),
        ("SKIP_LOCAL_SYSTEM_ID", "KP_Alice", "environment"),
        ("SKIP_REMOTE_SYSTEM_ID_1", "KP_Bob", "environment"),
        ("SKIP_REMOTE_SYSTEM_ID_9", "KP_*", "environment"),
        ("MYSQL_HOST", "127.0.0.1", "default"),
        ("MYSQL_PASSWORD", "***", f"file {path}"),
        ("RABBITMQ_URL", "***", "default"),
        ("SKIP_PORT", "81", f"TOML {toml}"),
        ("SKIP_HEARTBEAT_SECONDS", "5.0", "default"),
    ):
        assert line in lines


def run(capsys: pytest.CaptureFixture[str], argv: list[str], environ: dict[str, str]) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as caught:
        config_from_argv("skip-api", argv, environ)
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def test_config_from_argv_without_arguments_gives_the_settings() -> None:
    assert config_from_argv("skip-api", [], REQUIRED) == load()


def test_check_config_says_what_would_run_and_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, ["--check-config"], REQUIRED)
    assert (code, err) == (0, "")
    assert out.startswith("skip-api ")
    assert "SKIP_PORT" in out
    assert PASSWORD not in out


@pytest.mark.parametrize("argv", [[], ["--check-config"]])
def test_a_bad_configuration_prints_every_problem_on_stderr_and_exits_2(
    capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    code, out, err = run(capsys, argv, REQUIRED | {"SKIP_PORT": "x", "SKIP_PROT": "1"})
    assert (code, out) == (2, "")
    assert err.splitlines()[0] == "skip-api: the configuration has 2 problems:"
    assert [line.split()[0] for line in err.splitlines()[1:]] == ["SKIP_PROT", "SKIP_PORT"]


def test_load_settings_or_exit_exits_2_where_the_configuration_is_bad(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings_or_exit({}, "skip-janitor")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("skip-janitor: the configuration has 5 problems:\n")


def test_version_is_printed_and_exits_0_even_where_the_configuration_is_bad(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = run(capsys, ["--version"], {})
    assert code == 0
    assert out.startswith("skip-api ")


def test_help_names_every_variable(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, ["--help"], {})
    assert code == 0
    assert [name for name in known_names() if name not in out] == []


def test_an_unknown_argument_is_refused_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, ["--chek"], REQUIRED)
    assert code == 2
    assert "--chek" in err


def skipctl(*arguments: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-m", "skipbus.ctl", *arguments],
        cwd=root,
        env=environ | {"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_skipctl_config_check_prints_the_effective_configuration_with_secrets_hidden() -> None:
    done = skipctl("config", "check", environ=REQUIRED | {"SKIP_PORT": "8123"})
    assert (done.returncode, done.stderr) == (0, "")
    assert PASSWORD not in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["SKIP_PORT", "=", "8123", "(environment)"] in lines
    assert ["MYSQL_PASSWORD", "=", "***", "(environment)"] in lines


def test_skipctl_config_check_exits_2_with_every_problem() -> None:
    done = skipctl("config", "check", environ=without("MYSQL_USER", SKIP_PORT="x"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("skipctl: the configuration has 2 problems:\n")
    assert "Traceback" not in done.stderr


def test_the_page_about_the_configuration_is_what_skipctl_generates() -> None:
    done = skipctl("config", "markdown", environ={})
    assert (done.returncode, done.stderr) == (0, "")
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == done.stdout, "run: skipctl config markdown > docs/configuration.md"
    assert [name for name in known_names() if f"`{name}`" not in done.stdout] == []


def test_skipctl_without_a_command_exits_2() -> None:
    assert skipctl(environ={}).returncode == 2


def test_an_error_of_skipctl_is_one_sentence_with_exit_code_1(tmp_path: Path) -> None:
    done = skipctl("keyring", "show", environ=REQUIRED | {"SKIP_KEYRING_DIR": str(tmp_path / "absent")})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("skipctl: ")
    assert len(done.stderr.splitlines()) == 1


SERVICE_LINKS = {
    "MYSQL_PORT": "tcp://10.96.12.7:3306",
    "SKIP_PORT": "tcp://10.96.12.8:8080",
    "SKIP_METRICS_PORT": "tcp://10.96.12.8:9464",
    "SKIP_SERVICE_HOST": "10.96.12.8",
    "SKIP_SERVICE_PORT_HTTPS": "8443",
    "SKIP_API_SERVICE_HOST": "10.96.12.9",
    "SKIP_API_SERVICE_PORT": "8080",
    "SKIP_API_PORT": "tcp://10.96.12.9:8080",
    "SKIP_API_PORT_8080_TCP": "tcp://10.96.12.9:8080",
    "SKIP_API_PORT_8080_TCP_PROTO": "tcp",
    "SKIP_API_PORT_8080_TCP_PORT": "8080",
    "SKIP_API_PORT_8080_TCP_ADDR": "10.96.12.9",
}


def test_variables_that_an_orchestrator_sets_for_its_services_are_no_settings() -> None:
    plain = load_settings(REQUIRED)
    linked = load_settings(REQUIRED | SERVICE_LINKS | {"OTHER_SERVICE_HOST": "10.96.12.10"})
    assert linked == plain
    assert linked.service_links == tuple(sorted(SERVICE_LINKS))
    assert linked.mysql.port == 3306


def test_a_port_that_is_no_link_is_still_refused() -> None:
    with pytest.raises(ConfigurationError, match="MYSQL_PORT is 'http:"):
        load_settings(REQUIRED | {"MYSQL_PORT": "http://10.96.12.7:3306"})


def test_several_brokers_are_told_apart_though_a_password_holds_a_comma() -> None:
    brokers = "amqp://u:a,b@one:5672/,amqps://u:p@two/"
    assert load_settings(REQUIRED | {"RABBITMQ_URL": brokers}).rabbitmq_url.reveal() == brokers
    assert split_urls(brokers) == ["amqp://u:a,b@one:5672/", "amqps://u:p@two/"]
    with pytest.raises(ConfigurationError, match="RABBITMQ_URL is refused"):
        load_settings(REQUIRED | {"RABBITMQ_URL": "amqp://u:p@one/,amqp://"})


def test_a_secret_in_a_file_is_read_again_and_a_file_that_is_gone_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "password"
    settings = load_settings(without("MYSQL_PASSWORD", MYSQL_PASSWORD_FILE=private_file(file, "first\n")))
    private_file(file, "second\n")
    assert settings.mysql.password.reveal() == "first"
    assert settings.mysql.password.current().reveal() == "second"
    file.unlink()
    assert settings.mysql.password.current().reveal() == "first"


def test_a_secret_that_everybody_could_read_is_accepted_where_a_folder_keeps_them_out(open_folder: Path) -> None:
    environ = without("MYSQL_PASSWORD", MYSQL_PASSWORD_FILE=private_file(open_folder / "p", "secret\n", 0o444))
    with pytest.raises(ConfigurationError, match="defaultMode: 0400"):
        load_settings(environ)
    open_folder.chmod(0o750)
    assert load_settings(environ).mysql.password.reveal() == "secret"
