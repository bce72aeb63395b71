"""House rules as code: names agree, the environment is read in one place, nothing dangerous is called."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.training.run import STAGES
from flows.workspace.recipes import RunConfig

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("components", "flows", "monitoring", "registry", "serving")
SOURCES = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py")) if not p.stem.endswith("_pb2")]


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_there_is_something_to_look_at() -> None:
    assert len(SOURCES) > 40


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_one_name_everywhere(stage: str) -> None:
    if stage == "registration":
        assert (ROOT / "registry" / "models.py").is_file()
        assert (ROOT / "tests" / "registry" / "test_models.py").is_file()
        return
    assert (ROOT / "components" / f"{stage}.py").is_file()
    assert (ROOT / "tests" / "components" / f"test_{stage}.py").is_file()
    assert stage in RunConfig.model_fields
    assert f'name="{stage}"' in (ROOT / "flows" / "training" / "steps.py").read_text()


def test_the_environment_is_read_in_one_place() -> None:
    readers = [
        p.relative_to(ROOT).as_posix() for p in SOURCES if "os.environ" in p.read_text() or "os.getenv" in p.read_text()
    ]
    # What is quiet is set before anything else is imported, so it stands by itself.
    assert readers == ["flows/quiet.py", "flows/workspace/settings.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_dangerous_is_called(path: Path) -> None:
    text = path.read_text()
    for name, node in calls(ast.parse(text)):
        keywords = {k.arg: k.value for k in node.keywords}
        assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "joblib.load", "os.system"), name
        if name == "torch.load":
            assert ast.unparse(keywords["weights_only"]) == "True"
        if name == "np.load":
            assert "allow_pickle" not in keywords
        if name.startswith("subprocess."):
            assert "shell" not in keywords
    if "torch.load(" in text:
        assert path.name == "weights.py"
        assert "weights_only=True" in text


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_parquet_is_read_in_one_place() -> None:
    readers = [
        p.relative_to(ROOT).as_posix()
        for p in SOURCES
        if "read_parquet(" in p.read_text() or "ParquetFile(" in p.read_text()
    ]
    assert readers == ["components/tables.py"]


def test_only_the_named_places_use_random_numbers_of_their_own() -> None:
    users = [p.name for p in SOURCES if "import random" in p.read_text() or "np.random.seed" in p.read_text()]
    assert users == []


def test_no_module_is_named_after_nothing() -> None:
    banned = {"utils", "helpers", "common", "base", "manager", "misc"}
    assert [path for path in SOURCES if path.stem in banned] == []


def test_the_lock_has_hashes_and_no_addresses() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    packages = [line for line in lock.splitlines() if line and line[0].isalnum()]
    assert len(packages) > 150
    for part in lock.replace("\\\n", " ").splitlines():
        if part and part[0].isalnum():
            assert "--hash=sha256:" in part, part
