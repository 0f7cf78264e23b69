"""The built wheel: what it holds, and that it works beside distributions which are called as our folders are."""

import configparser
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"services": "skipbus/services", "shared": "skipbus/shared", "skipctl": "skipbus/ctl"}
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built by the installed setuptools and without a network."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in (*FOLDERS, "skipbus", "skipbus_testkit"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run([sys.executable, "-c", BUILD, str(built)], cwd=source, check=True, capture_output=True)
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment with our wheel and, beside it, other distributions of our folders' names."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    others = [another_wheel(name, folder) for name in FOLDERS]
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-index", "--no-deps", str(wheel), *others], check=True, capture_output=True)
    # Our dependencies come from this environment, but not our own code: its .pth files are not read.
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def another_wheel(name: str, folder: Path) -> str:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", f"OWNER = 'another {name}'\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return str(path)


def run(program: Path, *arguments: str) -> str:
    return subprocess.run(
        [str(program), *arguments], cwd=program.parent, check=True, capture_output=True, text=True
    ).stdout


def test_the_wheel_takes_no_top_level_name_but_its_own(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" not in name}
    assert tops == {"skipbus", "skipbus_testkit"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_of_a_folder_is_in_the_wheel_under_its_new_name(wheel: Path, folder: str) -> None:
    paths = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    expected = {f"{FOLDERS[folder]}/{path.relative_to(ROOT / folder)}" for path in paths}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if name.startswith(f"{FOLDERS[folder]}/")} == expected


def test_every_console_script_leads_to_code_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = next(name for name in names if name.endswith("/entry_points.txt"))
        parser = configparser.ConfigParser()
        parser.read_string(archive.read(entry_points).decode())
    scripts = dict(parser["console_scripts"])
    assert set(scripts) >= {"skipbus", "skip-api", "skip-syncer", "skip-janitor", "skipctl"}
    for target in scripts.values():
        assert target.split(":")[0].replace(".", "/") + ".py" in names


def test_it_and_the_distributions_beside_it_all_work(installed: Path) -> None:
    for name in FOLDERS:
        assert run(installed / "python", "-c", f"import {name}; print({name}.OWNER)") == f"another {name}\n"
    place = run(installed / "python", "-c", "import skipbus.shared.clock as it; print(it.__file__)")
    assert Path(place.strip()).is_relative_to(installed.parent)
    versions = [run(installed / name, "--version").split()[0] for name in ("skip-api", "skip-syncer", "skip-janitor")]
    assert versions == ["skip-api", "skip-syncer", "skip-janitor"]
    assert run(installed / "skipctl", "db", "--help")
    assert run(installed / "skipbus", "--help").startswith("usage: skipbus")


def test_what_the_installed_code_reads_from_files_came_with_it(installed: Path) -> None:
    revision = "from skipbus.shared.store.migrate import head_revision; print(head_revision())"
    assert run(installed / "python", "-c", revision) == run(
        Path(sys.executable), "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {revision}"
    )
    modes = "from skipbus.services.api.tls.self_check import find_psk_modes; print(find_psk_modes().fault)"
    assert run(installed / "python", "-c", modes) == "None\n"
