"""The two built wheels: what they hold and need, and that skipbus works beside distributions named like its folders."""

import configparser
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"services": "skipbus/services", "shared": "skipbus/shared", "skipctl": "skipbus/ctl"}
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
# What the testkit may not import where testers run it.
OF_THE_SERVER = (
    "import sys, importlib\n"
    "for name in {forbidden!r}: sys.modules[name] = None\n"
    "for name in {modules!r}: print(importlib.import_module(name).__file__)\n"
)
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds the wheel of a folder of this tree by the installed setuptools, without a network."""

    def build(folder: Path, *names: str) -> Path:
        source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
        for name in names:
            copy(folder / name, source / name)
        subprocess.run([sys.executable, "-c", BUILD, str(built)], cwd=source, check=True, capture_output=True)
        return next(built.glob("*.whl"))

    return build


def copy(path: Path, to: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, to, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    else:
        shutil.copy(path, to)


@pytest.fixture(scope="module")
def server_wheel(build: Build) -> Path:
    return build(ROOT, *FOLDERS, "skipbus", "skipbus_testkit", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def kit_wheel(build: Build) -> Path:
    return build(ROOT / "skipbus_testkit", *(path.name for path in (ROOT / "skipbus_testkit").iterdir()))


@pytest.fixture(scope="module")
def server(server_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment with skipbus and, beside it, other distributions that have its folders' names."""
    folder = tmp_path_factory.mktemp("others")
    return installed(
        tmp_path_factory.mktemp("server"), server_wheel, *(another_wheel(name, folder) for name in FOLDERS)
    )


@pytest.fixture(scope="module")
def kit(kit_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment with the testkit."""
    return installed(tmp_path_factory.mktemp("testkit"), kit_wheel)


def installed(folder: Path, *wheels: Path) -> Path:
    venv.create(folder, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-index", "--no-deps", *map(str, wheels)], check=True, capture_output=True)
    # Dependencies come from this environment, but not our own code: its .pth files are not read.
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def another_wheel(name: str, folder: Path) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", f"OWNER = 'another {name}'\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def run(program: Path, *arguments: str) -> str:
    command = [str(program), *arguments]
    result = subprocess.run(command, cwd=program.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def names_in(wheel: Path) -> set[str]:
    """The names of files, without those of the metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def metadata(wheel: Path, file: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith(f".dist-info/{file}"))).decode()


def entry_points(wheel: Path, group: str) -> dict[str, str]:
    parser = configparser.ConfigParser()
    parser.read_string(metadata(wheel, "entry_points.txt"))
    return dict(parser[group])


def requirements(wheel: Path) -> set[str]:
    """The names of what the wheel needs, extras left out."""
    found = Parser().parsestr(metadata(wheel, "METADATA")).get_all("Requires-Dist", [])
    return {re.split(r"[^\w.-]", line)[0].lower() for line in found if "extra ==" not in line}


def files_in(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    generated = ("__pycache__", "build", "skipbus_testkit.egg-info")
    return {str(path.relative_to(folder)) for path in paths if not set(path.parts) & set(generated)}


def test_the_wheel_takes_no_top_level_name_but_its_own(server_wheel: Path) -> None:
    assert {name.split("/")[0] for name in names_in(server_wheel)} == {"skipbus"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_of_a_folder_is_in_the_wheel_under_its_new_name(server_wheel: Path, folder: str) -> None:
    prefix = f"{FOLDERS[folder]}/"
    found = {name.removeprefix(prefix) for name in names_in(server_wheel) if name.startswith(prefix)}
    assert found == files_in(ROOT / folder)


def test_every_entry_point_leads_to_code_in_its_wheel(server_wheel: Path, kit_wheel: Path) -> None:
    programs = entry_points(server_wheel, "console_scripts")
    assert set(programs) == {"skipbus", "skip-api", "skip-syncer", "skip-janitor", "skipctl"}
    assert {target.split(":")[0].replace(".", "/") + ".py" for target in programs.values()} <= names_in(server_wheel)
    conformance = {"skipbus-conformance": "skipbus_testkit.conformance:main"}
    assert entry_points(kit_wheel, "console_scripts") == conformance
    assert entry_points(kit_wheel, "pytest11") == {"skipbus": "skipbus_testkit.plugin"}
    assert {"skipbus_testkit/conformance.py", "skipbus_testkit/plugin.py"} <= names_in(kit_wheel)


def test_skipbus_and_the_distributions_beside_it_all_work(server: Path) -> None:
    for name in FOLDERS:
        assert run(server / "python", "-c", f"import {name}; print({name}.OWNER)") == f"another {name}\n"
    place = run(server / "python", "-c", "import skipbus.shared.clock as it; print(it.__file__)")
    assert Path(place.strip()).is_relative_to(server.parent)
    for name in ("skip-api", "skip-syncer", "skip-janitor", "skipctl"):
        assert run(server / name, "--version").startswith(f"{name} ")
    assert run(server / "skipctl", "db", "--help")
    assert run(server / "skipbus", "--help").startswith("usage: skipbus")


def test_what_the_installed_code_reads_from_files_came_with_it(server: Path) -> None:
    revision = "from skipbus.shared.store.migrate import HEAD_REVISION, is_known; print(is_known(HEAD_REVISION))"
    assert run(server / "python", "-c", revision) == "True\n"
    modes = "from skipbus.services.api.tls.self_check import find_psk_modes; print(find_psk_modes().fault)"
    assert run(server / "python", "-c", modes) == "None\n"


def test_the_testkit_holds_every_file_of_its_folder(kit_wheel: Path) -> None:
    found = {name.removeprefix("skipbus_testkit/") for name in names_in(kit_wheel)}
    assert found == files_in(ROOT / "skipbus_testkit") - {"pyproject.toml"}


def test_the_testkit_needs_nothing_of_the_server(server_wheel: Path, kit_wheel: Path) -> None:
    assert requirements(kit_wheel) == {"pytest", "testcontainers", "trustme"}
    assert requirements(server_wheel) & requirements(kit_wheel) == set()


def test_every_module_that_testers_run_loads_without_the_servers_dependencies(
    server_wheel: Path, kit_wheel: Path, kit: Path
) -> None:
    # Of cryptography alone another distribution, trustme, has need too.
    forbidden = [*requirements(server_wheel) - {"cryptography"}, "prometheus_client", "aio_pika", "skipbus"]
    copied_in = "skipbus_testkit/container/"
    modules = [name[:-3].replace("/", ".") for name in names_in(kit_wheel) if name.endswith(".py")]
    modules = [name for name in modules if not name.startswith(copied_in.replace("/", "."))]
    assert "skipbus_testkit.pair" in modules
    loaded = run(kit / "python", "-c", OF_THE_SERVER.format(forbidden=forbidden, modules=modules)).split()
    assert all(Path(file).is_relative_to(kit.parent) for file in loaded)
    assert run(kit / "skipbus-conformance", "--help").startswith("usage: skipbus-conformance")


def test_the_two_distributions_have_one_version() -> None:
    files = (ROOT / "pyproject.toml", ROOT / "skipbus_testkit" / "pyproject.toml")
    versions = {tomllib.loads(file.read_text())["project"]["version"] for file in files}
    assert len(versions) == 1
