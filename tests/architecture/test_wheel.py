"""A wheel of this tree holds every package and data file, and runs where the tree is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from served import publish, server, smoke_release, unpacked

from components.releases import GOLDEN, ReleaseStore

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


@pytest.mark.slow
def test_the_wheel_serves_in_the_environment_of_its_own_lock(
    wheel: zipfile.ZipFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`visionloop[serve]`: nothing but what infra/locks/serve.txt holds, and the same answers."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    uv, place = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv"), tmp_path / "environment"
    python, serving = place / "bin" / "python", tmp_path / "serving"

    def run(*command: object, status: int = 0) -> str:
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    run(uv, "venv", "--python", sys.executable, place)
    run(uv, "pip", "sync", "--python", python, ROOT / "infra" / "locks" / "serve.txt")
    run(uv, "pip", "install", "--python", python, "--no-deps", wheel.filename)
    run(uv, "pip", "check", "--python", python)
    heavy = ("torch", "mlflow", "prefect", "dvc", "pandas", "sqlalchemy", "evidently", "great_expectations")
    found = "import importlib.util as u; print([name for name in {} if u.find_spec(name)])"
    assert run(python, "-c", found.format(heavy)) == "[]\n"
    assert sum(path.lstat().st_size for path in place.rglob("*") if not path.is_symlink()) < 700e6

    run(place / "bin" / "visionloop", "init", "--serving", serving)
    assert sorted(path.name for path in serving.iterdir()) == [".visionloop"]
    told = run(place / "bin" / "visionloop", "data", "status", "-w", serving, status=2)
    assert "not in a visionloop workspace" in told
    release = smoke_release(unpacked(tmp_path))
    publish(ReleaseStore(str(serving / ".visionloop" / "releases")), release, 1, "1")
    golden = load_file(release.folder / GOLDEN)
    classes = release.record.engine.classes
    with server(serving, python=str(python)) as mine:
        for index, expected in enumerate(golden["probabilities"]):
            answer = mine.predict(golden[f"encoded.{index:03d}"].tobytes()).json
            assert [answer["probabilities"][name] for name in classes] == pytest.approx(expected.tolist(), abs=1e-5)
        assert mine.stop() == 0
        # Sealing, which a process of its own does and may end after the server, writes what was answered.
        verify = (place / "bin" / "visionloop", "predictions", "verify", "-w", serving)
        mine.wait_for(lambda: f"{len(golden['probabilities'])} predictions" in run(*verify))
