"""What a user installs: one top-level name with everything inside, from a wheel or a source archive, far from any checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import marlin_tools.resources

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {"marlin_tools": "marlin_tools", "kernels": "marlin_tools/_kernels", "recipes": "marlin_tools/_recipes"}

FIND = "from marlin_tools import resources; print(resources.{}_dir())"


def _files(folder: Path) -> set[str]:
    every = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in every}


def _run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _build(source: Path, target: Path, kind: str) -> Path:
    _run(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", target, cwd=source)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return _build(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return _build(ROOT, tmp_path_factory.mktemp("sdist"), "sdist")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with nothing but our wheel in it, and an environment in which Python looks there first."""
    target = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile")
    _run(*pip, "--target", target, wheel, cwd=target)
    return target, os.environ | {"PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": "1"}


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_has_one_top_level_name(wheel):
    tops = {name.partition("/")[0] for name in _names(wheel)}

    assert tops == {"marlin_tools", f"marlin_tools-{marlin_tools.__version__}.dist-info"}
    assert wheel.name == f"marlin_tools-{marlin_tools.__version__}-py3-none-any.whl"


@pytest.mark.parametrize(("folder", "inside"), SHIPPED.items())
def test_wheel_holds_every_file(wheel, folder, inside):
    expected = {f"{inside}/{name}" for name in _files(ROOT / folder)}

    assert expected
    assert expected <= _names(wheel)


def test_wheel_holds_the_whole_package(wheel):
    """Not the modules alone: the pages have a style sheet."""
    assert {f"marlin_tools/{name}" for name in _files(ROOT / "marlin_tools")} <= _names(wheel)


def test_wheel_holds_nothing_compiled(wheel):
    assert [name for name in _names(wheel) if name.endswith((".pyc", ".so")) or "__pycache__" in name] == []


def test_source_archive_builds_the_same_wheel(wheel, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    again = _build(source, tmp_path / "again", "wheel")

    assert _names(again) == _names(wheel)


def test_installed_wheel_runs_outside_the_checkout(installed, tmp_path):
    _, env = installed

    assert marlin_tools.__version__ in _run(sys.executable, "-m", "marlin_tools", "--version", cwd=tmp_path, env=env)


@pytest.mark.parametrize("folder", ("kernels", "recipes", "demo"))
def test_installed_wheel_finds_what_it_ships(installed, tmp_path, folder):
    target, env = installed
    there = Path(_run(sys.executable, "-c", FIND.format(folder), cwd=tmp_path, env=env).strip())
    here = getattr(marlin_tools.resources, f"{folder}_dir")()

    assert there.is_relative_to(target)
    assert here.is_relative_to(ROOT)
    assert _files(here) == _files(there) != set()


def test_metadata_names_the_command_and_the_license(wheel):
    folder = f"marlin_tools-{marlin_tools.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{folder}/METADATA").decode()
        commands = archive.read(f"{folder}/entry_points.txt").decode()

    assert "marlin-tools = marlin_tools.__main__:main" in commands
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert f"{folder}/licenses/LICENSE" in _names(wheel)


def test_every_dependency_is_pinned():
    """`constraints.txt` makes both commands repeatable only if nothing direct is left open."""
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines if not line.startswith("#")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [
        Requirement(text) for group in (project["dependencies"], *project["optional-dependencies"].values()) for text in group
    ]

    for requirement in asked:
        if requirement.name != "marlin-tools":
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
