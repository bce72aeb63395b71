"""The estimate of a recipe from folds: all images take turns as test images."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file
from shapes import visionloop

from flows.training.results import folds_proposed
from flows.workspace.recipes import load_recipe
from flows.workspace.workspace import Workspace

STORE = Path(".visionloop") / "store"


@pytest.mark.slow
def test_every_image_is_answered_once_by_a_model_that_never_saw_it(trained: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(trained, tmp_path / "workspace", symlinks=True))
    before = json.loads((root / "summary.json").read_text())
    arguments = ("train", "-r", "smoke", "--set", "evaluation.folds=2", "--set", "training.fit.epochs=2", "--json")
    done = visionloop(*arguments, cwd=root)
    assert done.returncode in (0, 1), done.stderr
    told = json.loads(done.stdout.strip().splitlines()[-1])
    everything = set(pd.read_parquet(next((root / STORE / "splitting").glob("*/splits.parquet")))["path"])
    answered: list[str] = []
    for number in (1, 2):
        (table,) = (root / STORE / "splitting" / f"fold-{number}-of-2").glob("*/splits.parquet")
        rows = pd.read_parquet(table)
        assert set(rows["path"]) == everything
        test = rows[rows["split"] == "test"]
        assert not set(test["picture"]) & set(rows.loc[rows["split"] != "test", "picture"])
        assert set(rows["split"]) == {"train", "valid", "calibration", "test"}
        answered += list(test["path"])
    assert sorted(answered) == sorted(everything)
    assert told["folds"]["metrics"]["accuracy"]["n"] == len(everything) == before["data"]["kept"]
    assert told["folds"]["told"].startswith("Estimate of the recipe: accuracy ")
    assert told["folds"]["told"] in Path(told["report"]).read_text()
    assert told["folds_proposed"] == ""
    # What is judged is the model of the frozen test, with folds or without.
    assert told["data"]["splits"] == before["data"]["splits"]


def test_folds_are_proposed_where_few_test_images_decide_nothing(trained: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(trained, tmp_path / "workspace", symlinks=True))
    before = json.loads((root / "summary.json").read_text())
    assert before["folds_proposed"] == ""
    accuracy = before["engines"][before["serving_engine"]]["metrics"]["accuracy"]
    floor = (accuracy["low"] + accuracy["value"]) / 2  # inside the interval
    gates = f"gating.gates=[{{gate: accuracy, settings: {{floor: {floor}}}}}]"
    done = visionloop("train", "-r", "smoke", "--set", gates, "--json", cwd=root)
    told = json.loads(done.stdout.strip().splitlines()[-1])
    proposed = f"{accuracy['n']} test images did not decide accuracy: --set evaluation.folds=5 adds an estimate"
    assert told["folds_proposed"].startswith(proposed)
    assert proposed in Path(told["report"]).read_text()


def test_more_folds_than_a_class_has_pictures_are_refused_before_any_training(workspace: Path) -> None:
    for path in sorted((workspace / "data" / "disc").iterdir())[18:]:
        path.unlink()
    assert visionloop("data", "add", cwd=workspace).returncode == 0
    settings = ("--set", "evaluation.folds=20", "--set", "training.fit.epochs=1")
    done = visionloop("train", "-r", "smoke", *settings, cwd=workspace)
    assert done.returncode == 2, done.stderr
    assert re.search(r"evaluation.folds: in fold-\d+-of-20, class 'disc' has no image in the test split", done.stderr)
    assert "set fewer folds, or none" in done.stderr
    assert "training" not in done.stdout


def test_folds_that_say_nothing_are_refused(trained: Path) -> None:
    for override, text in (
        ("evaluation.folds=1", "one fold leaves nothing to train on"),
        ("evaluation.folds=21", "less than or equal to 20"),
    ):
        done = visionloop("train", "-r", "smoke", "--set", override, cwd=trained)
        assert (done.returncode, text in done.stderr) == (2, True), done.stderr
    done = visionloop("train", "-r", "warm-start", "--set", "evaluation.folds=5", cwd=trained)
    assert (done.returncode, "a champion saw them" in done.stderr) == (2, True), done.stderr


def test_weights_of_a_checkpoint_have_seen_the_images_and_folds_are_neither_made_nor_proposed(
    trained: Path, tmp_path: Path
) -> None:
    weights = next((trained / STORE / "training").glob("*/weights.safetensors")).relative_to(trained)
    backbone = tmp_path / "backbone.safetensors"
    state = load_file(trained / weights)
    save_file({name.removeprefix("backbone."): state[name] for name in state if name.startswith("backbone.")}, backbone)
    from_checkpoint, from_backbone = f"training.weights={weights}", f"training.weights={backbone}"
    folds = "evaluation.folds=2"
    done = visionloop("train", "-r", "smoke", "--set", folds, "--set", from_checkpoint, cwd=trained)
    assert (done.returncode, "of a checkpoint, whose training may have seen any" in done.stderr) == (2, True), done.stderr
    load_recipe("smoke", [folds, from_backbone], workspace=trained)

    findings = [SimpleNamespace(status="inconclusive", n=54, gate=gate) for gate in ("robustness", "accuracy")]
    results: Any = SimpleNamespace(
        folds=None,
        verdict=SimpleNamespace(record=SimpleNamespace(engines=[SimpleNamespace(serving=True, findings=findings)])),
        splits=SimpleNamespace(record=SimpleNamespace(counts={"test": 54})),
        dataset=SimpleNamespace(record=SimpleNamespace(num_kept=180)),
    )

    def proposed(override: str) -> str:
        gates = "gating.gates=[{gate: accuracy, settings: {floor: 0.6}}, {gate: robustness}]"
        config = load_recipe("smoke", [gates, override], workspace=trained)
        run: Any = SimpleNamespace(config=config, workspace=Workspace(trained))
        return folds_proposed(run, results)

    # Folds would tell nothing of what is asked under corruption, of some test images only.
    assert proposed(from_backbone).startswith("54 test images did not decide accuracy: ")
    assert proposed(from_checkpoint) == ""
    del findings[1]
    assert proposed(from_backbone) == ""
