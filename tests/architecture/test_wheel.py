"""The wheel holds the four packages with their data, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import PurePosixPath

import pytest

from tests.architecture.sources import PACKAGES, ROOT, tracked_files


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel that is built from a copy, so that no build folder is left in the sources."""
    if find_spec("setuptools") is None:
        pytest.skip("building without a network needs setuptools in this environment")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in tracked_files():
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(target), str(source)], check=True, timeout=150)
    (wheel,) = target.glob("tessera-*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_only_our_packages(wheel_names: set[str]) -> None:
    tops = {PurePosixPath(name).parts[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)


def test_every_tracked_file_of_the_packages_is_in_the_wheel(wheel_names: set[str]) -> None:
    """Sprites, weights and configs are found by patterns in pyproject.toml, which a new folder can miss."""
    tracked = {str(PurePosixPath(*path.relative_to(ROOT).parts)) for path in tracked_files()}
    ours = {name for name in tracked if PurePosixPath(name).parts[0] in PACKAGES}
    assert ours - wheel_names == set()
    assert {f"{package}/py.typed" for package in PACKAGES} <= wheel_names


def test_the_licence_is_in_the_wheel(wheel_names: set[str]) -> None:
    assert any(PurePosixPath(name).name == "LICENSE" and ".dist-info/" in name for name in wheel_names)
