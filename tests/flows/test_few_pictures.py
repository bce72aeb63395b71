"""From five pictures of each class, and a test set that a person brought, to a model that says how it came about."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from shapes import SMOKE, commit, visionloop, write_pictures
from small_splits import NETWORK

from flows.workspace.workspace import Workspace

TRAINED = 5
FEWSHOT = f"""
name: few
model: shapes
description: A head on frozen features of five pictures each.
validation: {{min_images_per_class: 4}}
splitting: {{valid_share: 0, calibration_share: 0}}
training:
  backbone: small_cnn
  backbone_settings: {json.dumps({**NETWORK, "width": 8, "embedding_dim": 16})}
  weights: start.safetensors
  phases: [{{trains: head, head: auto, views: 2, augmentations: [{{augmentation: flip}}]}}]
export:
  serving: onnxruntime-fp32
  targets: [{{target: onnxruntime}}]
{SMOKE[SMOKE.index("evaluation:") : SMOKE.index("gating:")]}
gating:
  gates:
    - {{gate: accuracy, settings: {{floor: 0.4}}}}
    - {{gate: parity, settings: {{min_images: 20, min_proven: 0.6}}}}
    - {{gate: no_regression}}
"""


@pytest.fixture
def few(trained: Path, tmp_path: Path) -> Path:
    """A workspace with five pictures of each class that train and twenty to test on."""
    from safetensors.numpy import load_file, save_file

    folder, root = tmp_path / "photos", tmp_path / "few"
    write_pictures(folder / "train", TRAINED)
    write_pictures(folder / "test", 20, start=100)
    Workspace.create(root)
    done = visionloop("data", "add", str(folder), "--keep-splits", cwd=root)
    assert done.returncode == 0, done.stderr
    (weights,) = (trained / ".visionloop" / "store" / "training").glob("*/weights.safetensors")
    backbone = {n.removeprefix("backbone."): v for n, v in load_file(weights).items() if n.startswith("backbone.")}
    save_file(backbone, root / "start.safetensors")
    (root / "recipes" / "few.yaml").write_text(FEWSHOT)
    subprocess.run(["git", "add", "recipes"], cwd=root, check=True)
    commit(root)
    return root


def test_five_pictures_of_each_class_make_a_candidate(few: Path, prefect_server: str) -> None:
    planned = visionloop("train", "-r", "few", "--dry-run", cwd=few)
    assert planned.returncode == 0, planned.stderr
    assert "phase 1, the head, computed in one step: about 15 train images in 2 views" in planned.stdout
    assert "computed in seconds" in planned.stdout
    done = visionloop("train", "-r", "few", "--json", cwd=few)
    assert done.returncode == 0, done.stderr + done.stdout
    summary: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    assert summary["outcome"] == "candidate"
    assert summary["data"]["splits"] == {"train": 15, "valid": 0, "calibration": 0, "test": 60}
    assert summary["engines"]["onnxruntime-fp32"]["metrics"]["accuracy"]["n"] == 60
    run = Path(summary["run_folder"])
    report = (run / "report.html").read_text()
    assert "The head was computed in one step, as " in report
    assert "there are no epochs, and no curve." in report
    assert "of 15 train images are answered right by heads that were computed without them" in report.replace("\u00a0", " ")
    assert "No epochs; temperature" in report
    assert "train loss" not in report
    card = (run / ".bundle" / "model-card.md").read_text()
    assert "trained: the head, computed in one step" in card
    assert 'Answers below confidence 0.5000 are "unsure"' in card
    release = json.loads((run / "7-packaging" / "manifest.json").read_text())["record"]
    assert release["decision"]["num_valid"] == 0
    assert "It serves onnxruntime-fp32, trained by recipe few" in visionloop("show", "1", cwd=few).stdout
    again = visionloop("train", "-r", "few", "--json", cwd=few)
    assert json.loads(again.stdout.strip().splitlines()[-1])["seconds"]["training"]["cached"]


def test_a_usual_recipe_says_what_fits_few_pictures(few: Path) -> None:
    for kind in ("cross", "disc", "stripes"):
        for path in sorted((few / "data" / kind).iterdir())[2:]:
            if path.name < "0100":
                path.unlink()
    assert visionloop("data", "add", cwd=few).returncode == 0
    shutil.copy(few / "recipes" / "few.yaml", few / "recipes" / "usual.yaml")
    (few / "recipes" / "usual.yaml").write_text(SMOKE.replace("name: smoke", "name: usual"))
    done = visionloop("train", "-r", "usual", cwd=few)
    assert done.returncode == 2
    assert "where every class has few, the recipe fewshot trains on all of them" in done.stderr.replace("\n", " ")
