"""What may be loaded where, proven by looking at sys.modules of a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ["torch", "mlflow", "great_expectations", "evidently", "prefect", "tensorrt_rtx", "timm"]


def loaded_by(code: str, cwd: Path) -> set[str]:
    program = f"{code}\nimport sys, json\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.strip().splitlines()[-1]))


def test_light_commands_load_no_heavy_library(workspace: Path) -> None:
    """One after the other in one process: what is told of a command is what it loaded and those before it did not."""
    commands = {
        "--help": 0,
        "data --help": 0,
        "train --help": 0,
        "data status": 0,
        "data diff": 0,
        "data log": 0,
        "data add": 0,
        "recipe show smoke": 0,
        "recipe list": 0,
        "runs": 0,
        # A typo is found before anything heavy is loaded.
        "train -r smoke --set training.fit.epoch=1": 2,
    }
    program = f"""
import json, sys
from flows.cli import main
told, before = {{}}, set()
for command in {list(commands)!r}:
    sys.argv = ["visionloop", *command.split()]
    try:
        main()
    except SystemExit as end:
        status = end.code or 0
    loaded = {{name for name in {HEAVY!r} if name in sys.modules}}
    told[command], before = [status, sorted(loaded - before)], loaded
print()
print(json.dumps(told))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {command: [status, []] for command, status in commands.items()}


def test_a_machine_that_only_serves_looks_after_what_it_kept(tmp_path: Path) -> None:
    """Where infra/locks/serve.txt is installed, none of these libraries is there."""
    absent = [*HEAVY, "pandas", "sqlalchemy", "dvc", "sklearn"]
    program = f"""
import sys
for name in {absent!r}:
    sys.modules[name] = None
from flows.cli import main
sys.argv = ["visionloop", *sys.argv[1:]]
main()
"""

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr

    assert run("init", "--serving", ".")[0] == 0
    assert run("predictions", "verify") == (0, "0 segments, 0 predictions, 0 twice, 0 lost\n")
    status, told = run("predictions", "erase", "0" * 64, "--as", "Ada", "--reason", "asked for")
    assert status == 0, told
    assert run("predictions", "verify")[1].splitlines()[1].startswith("1 image erased")


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_an_engine_answers_without_torch(target: str, trained: Path) -> None:
    """What a server needs: verify a published engine, decode a file, answer."""
    code = f"""
import json
from pathlib import Path
from components import plugins
from components.contracts.models import Engine
from components.images import load_prepared
from components.store import Store
store = Store(Path(".visionloop/store"))
folder = next(Path(".visionloop/store/export").glob("{target}-*/*"))
engine = store.open("export/" + folder.parent.name, folder.name, Engine)
predictor = plugins.load("targets", "{target}").load(engine, num_threads=1)
image = load_prepared(next(Path("data").rglob("*.png")), engine.record.preprocessing)
logits, embedding = predictor.predict(image[None])
assert logits.shape == (1, 3) and embedding.shape == (1, 16)
"""
    assert loaded_by(code, trained) & (set(HEAVY) | {"dvc", "sqlalchemy"}) == set()


@pytest.mark.slow
def test_every_library_imports_beside_the_others() -> None:
    """uv resolves versions that do not work together; this set does (pyproject.toml says which caps it needs)."""
    names = (
        "prefect mlflow great_expectations evidently dvc.repo torch torchvision timm onnx onnxruntime openvino nncf sklearn"
    )
    loaded = loaded_by("\n".join(f"import {name}" for name in names.split()), Path.cwd())
    assert {name.split(".")[0] for name in names.split()} <= loaded


def test_a_window_is_judged_without_trainer_orchestrator_and_registry(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
from pathlib import Path
from watched import END, START, TASK, release, rows, sample
from monitoring.drift import DriftPolicy, judge
from monitoring.governor import Governor
from monitoring.labels import Labels
from monitoring.outbox import Outbox
from monitoring.reference import load_reference
from components.predictionlog import Stretch
from monitoring.window import open_window
mine = release(Path("release"))
window = open_window(Stretch((rows(sample(300, 1), "r"),), 0, ()), mine.record, TASK, "r", "1", since=START, until=END, most=1000)
verdict, measured = judge(load_reference(mine, TASK), window, DriftPolicy(), reference_sha256="0")
assert verdict.status == "pass", verdict
"""
    assert loaded_by(code, tmp_path) & {"torch", "mlflow", "prefect", "great_expectations", "dvc", "timm"} == set()


def test_looking_at_a_quiet_window_loads_no_evidently(tmp_path: Path) -> None:
    """Most windows of a small installation hold too little to compare: they should cost no ten seconds of imports."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
from pathlib import Path
from watched import END, START, TASK, release, rows, sample
from monitoring.drift import DriftPolicy, judge
from monitoring.reference import load_reference
from components.predictionlog import Stretch
from monitoring.window import open_window
mine = release(Path("release"))
for given in (sample(0, 1), sample(20, 1)):
    window = open_window(Stretch((rows(given, "r"),), 0, ()), mine.record, TASK, "r", "1", since=START, until=END, most=1000)
    verdict, measured = judge(load_reference(mine, TASK), window, DriftPolicy(), reference_sha256="0")
    assert measured is None
"""
    assert loaded_by(code, tmp_path) & {"evidently", *HEAVY} == set()
