"""A wheel of this tree holds every package and data file, and runs where the tree is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("components", "flows", "monitoring", "registry", "serving")
# The hook that pip and uv call; neither of them is in the locked environment.
BUILD = "from setuptools import build_meta; build_meta.build_wheel('wheel')"
# What the installed script `visionloop` does.
SCRIPT = "from importlib.metadata import entry_points; next(iter(entry_points(name='visionloop'))).load()()"


def files_of_the_tree() -> set[str]:
    told = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PACKAGES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name for name in told.stdout.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy: building leaves folders behind, which the next wheel would be filled from."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE", *files_of_the_tree()):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    built = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = (copy / "wheel").glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    held, wanted = {name for name in wheel.namelist() if ".dist-info/" not in name}, files_of_the_tree()
    assert len(wanted) > 100
    assert wanted - held == set(), "left out"
    assert held - wanted == set(), "does not belong there"


def test_the_command_runs_from_the_wheel_alone(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    wheel.extractall(target)
    elsewhere.mkdir()
    # Without `site` no .pth file leads back to the tree; the libraries are named one by one.
    libraries = [path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "tests"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(target), *libraries])}
    for how in (["-c", SCRIPT], ["-m", "flows"]):
        done = subprocess.run(
            [sys.executable, "-P", "-S", *how, "--help"], cwd=elsewhere, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "train" in done.stdout
