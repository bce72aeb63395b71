"""House rules as code: names agree, the environment is read in one place, nothing dangerous is called."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from flows.training.run import STAGES
from flows.workspace.recipes import RunConfig

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("components", "flows", "monitoring", "registry", "serving")
SOURCES = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py")) if not p.stem.endswith("_pb2")]
TEXTS = {p.relative_to(ROOT).as_posix(): p.read_text() for p in SOURCES}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}
FORBIDDEN = ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "joblib.load", "os.system")


def holding(*words: str) -> list[str]:
    """The files in which one of the words stands."""
    return [name for name, text in TEXTS.items() if any(word in text for word in words)]


def is_dangerous(call: ast.Call) -> bool:
    """Whether the call runs what a file or a shell says."""
    name, keywords = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
    return (
        name in FORBIDDEN
        or (name == "torch.load" and keywords.get("weights_only") != "True")
        or (name == "np.load" and "allow_pickle" in keywords)
        or (name.startswith("subprocess.") and "shell" in keywords)
    )


def test_there_is_something_to_look_at() -> None:
    assert len(SOURCES) > 40


@pytest.mark.parametrize("stage", [*STAGES, "optimisation"])
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
    # What is quiet is set before anything else is imported, so it stands by itself.
    assert holding("os.environ", "os.getenv") == ["flows/quiet.py", "flows/workspace/settings.py"]


def test_nothing_dangerous_is_called() -> None:
    found = [
        f"{name}:{node.lineno}: {ast.unparse(node)}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and is_dangerous(node)
    ]
    assert found == []
    # What opens foreign files is the text of a process of its own, which no syntax tree of ours holds.
    assert holding("pickle.load(") == ["components/sources/torchvision.py"]
    assert holding("torch.load(") == ["components/weights.py"]
    assert "weights_only=True)" in TEXTS["components/weights.py"]


def test_the_map_of_the_product_is_read_at_one_look() -> None:
    assert len(TEXTS["flows/train.py"].splitlines()) <= 80


def test_every_module_says_what_it_is_for() -> None:
    assert [name for name, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_every_folder_is_a_package() -> None:
    # The import contracts do not look into a folder without one.
    assert {path.parent for path in SOURCES if not (path.parent / "__init__.py").is_file()} == set()


def test_parquet_is_read_in_one_place() -> None:
    assert holding("read_parquet(", "ParquetFile(") == ["components/tables.py"]
    assert not [path for path in (ROOT / "bench").rglob("*.py") if "read_parquet(" in path.read_text()]


def test_only_the_named_places_use_random_numbers_of_their_own() -> None:
    assert holding("import random", "np.random.seed") == []


def test_no_module_is_named_after_nothing() -> None:
    banned = {"utils", "helpers", "common", "base", "manager", "misc"}
    assert [path for path in SOURCES if path.stem in banned] == []


def pins(lock: Path) -> dict[str, str]:
    """What a lock holds, each with its hashes and without an address."""
    text = lock.read_text()
    assert "://" not in text
    parts = [part for part in text.replace("\\\n", " ").splitlines() if part and part[0].isalnum()]
    assert [part for part in parts if "--hash=sha256:" not in part] == []
    return dict(part.split(" ")[0].split("==") for part in parts)


def test_the_locks_have_hashes_and_no_addresses_and_agree() -> None:
    whole, serving = pins(ROOT / "requirements.lock"), pins(ROOT / "infra" / "locks" / "serve.txt")
    assert len(whole) > 150
    # What serves was tested with these versions.
    assert serving.items() <= whole.items()
    heavy = {"torch", "mlflow", "prefect", "dvc", "evidently", "great-expectations", "pandas", "sqlalchemy", "nncf"}
    assert heavy <= whole.keys()
    assert heavy & serving.keys() == set()


def test_every_environment_of_a_converter_is_locked_with_the_torch_that_writes_its_programs() -> None:
    locks = [path.with_suffix(".txt") for path in (ROOT / "infra" / "locks").glob("*.in")]
    assert len(locks) >= 2
    assert {pins(lock)["torch"] for lock in locks} == {pins(ROOT / "requirements.lock")["torch"]}
