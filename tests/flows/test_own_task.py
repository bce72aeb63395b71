"""A task of the workspace's own, several labels a picture, goes the whole way without an edit outside its file."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from looped import LOOP
from PIL import Image
from served import MODEL, encoded, server
from shapes import SMOKE, commit, picture, visionloop

pytestmark = pytest.mark.slow
TASK = Path(__file__).parents[1] / "tasks_of_tests" / "several_labels.py"
GATES = (
    "[{gate: accuracy, settings: {floor: 0.5}}, {gate: parity, settings: {min_images: 20, min_agreement: {int8: 0.8}, min_proven: 0.5}}, "
    "{gate: no_regression, settings: {margin: 0.4, max_negative_flips: 0.3}}]"
)


def shown(label: str, seed: int) -> Image.Image:
    """A picture of all the shapes that a label names, one over the other."""
    layers = [picture(kind, seed) for kind in label.split("+")]
    return Image.fromarray(np.maximum.reduce(layers))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Path:
    """A workspace whose recipe trains the task; version 1 is champion."""
    from flows.workspace.data import add
    from flows.workspace.workspace import Workspace

    root = tmp_path_factory.mktemp("own") / "workspace"
    workspace = Workspace.create(root)
    (root / "plugins" / "tasks").mkdir(parents=True)
    shutil.copyfile(TASK, root / "plugins" / "tasks" / TASK.name)
    photos = root.parent / "photos"
    for label in ("cross", "disc", "cross+disc"):
        (photos / label).mkdir(parents=True)
        for seed in range(60):
            shown(label, seed).save(photos / label / f"{seed:04d}.png")
    add(workspace, photos, test_share=0.3)
    recipe = SMOKE[: SMOKE.index("gating:")].replace(
        "  backbone: small_cnn", "  task: several_labels\n  backbone: small_cnn"
    )
    (root / "recipes" / "smoke.yaml").write_text(recipe.replace("epochs: 6", "epochs: 12") + f"gating: {{gates: {GATES}}}\n")
    (root / "loops").mkdir()
    (root / "loops" / f"{MODEL}.yaml").write_text(LOOP)
    subprocess.run(["git", "add", "recipes", "plugins", "loops"], cwd=root, check=True)
    commit(root)
    assert told("train", "-r", "smoke", cwd=root)["outcome"] == "candidate"
    told("approve", "1", "--as", "Ann", "--reason", "good", cwd=root)
    told("promote", "1", cwd=root)
    return root


def told(*arguments: str, cwd: Path, status: int = 0) -> Any:
    done = visionloop(*arguments, "--json", cwd=cwd)
    assert done.returncode == status, (arguments, done.stdout[-3000:], done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_it_is_judged_by_its_own_headline_and_against_its_champion(own: Path) -> None:
    again = told("train", "-r", "smoke", "--set", "training.fit.seed=1", cwd=own)
    assert (again["outcome"], again["headline"]) == ("candidate", "exact_match")
    messages = {finding["gate"]: finding["message"] for finding in again["findings"]}
    assert messages["accuracy"].startswith("exact_match ")
    assert "the champion's" in messages["no_regression"]
    assert "share of equal answers" in messages["parity"]
    summary = told("show", again["version"], cwd=own)["summary"]
    assert (summary["classes"], summary["classes_new"]) == (["cross", "disc"], [])
    assert set(summary["recall"]) == {"cross", "disc"}
    assert "exact_match" in visionloop("candidates", cwd=own).stdout
    page = Path(again["report"]).read_text()
    assert "<h2>Confusion" not in page
    assert "valid exact match" in page
    assert "exact match on the frozen test split" in _loop_page(own)


def _loop_page(own: Path) -> str:
    done = visionloop("report", "--out", "loop.html", cwd=own)
    assert done.returncode == 0, done.stderr
    return (own / "loop.html").read_text()


def test_it_serves_is_logged_and_watched(own: Path) -> None:
    import tritonclient.grpc as triton_grpc

    labels = ("cross", "disc", "cross+disc")
    asked = [(labels[seed % 3], encoded(shown(labels[seed % 3], 7000 + seed), "PNG")) for seed in range(90)]
    with server(own) as running:
        replies = [running.predict(data).json for _, data in asked]
        client = triton_grpc.InferenceServerClient(f"127.0.0.1:{running.grpc_port}")
        names = [output.name for output in client.get_model_metadata(MODEL).outputs]
        given = triton_grpc.InferInput("images", [1], "BYTES")
        given.set_data_from_numpy(np.array([encoded(shown("cross+disc", 7500), "PNG")], dtype=np.object_))
        answer = client.infer(MODEL, [given])
        body = json.dumps({"inputs": [], "outputs": [{"name": "boxes"}]}).encode()
        refused = running.ask("POST", f"/v2/models/{MODEL}/infer", body)
        client.close()
        assert running.stop() == 0
    assert names == ["label", "unsure", "confidence", "probabilities", "present", "num_labels", "embedding", "prediction_id"]
    assert (refused.status, refused.json["error"]) == (400, f"unknown output 'boxes'; valid: {', '.join(names)}")
    right = [reply["predicted"] == label for reply, (label, _) in zip(replies, asked, strict=True)]
    assert np.mean(right) > 0.6
    both = next(reply for reply in replies if reply["predicted"] == "cross+disc")
    assert min(both["probabilities"].values()) > 0.5
    assert (both["present"], both["num_labels"]) == ({"cross": True, "disc": True}, 2)
    probabilities, present = answer.as_numpy("probabilities"), answer.as_numpy("present")
    assert probabilities.shape == present.shape == (1, 2)
    assert answer.as_numpy("num_labels").tolist() == [int(present.sum())]
    ((said,), (sure,)) = answer.as_numpy("label"), answer.as_numpy("confidence")
    assert sure == pytest.approx(np.maximum(probabilities, 1 - probabilities).min())

    told("predictions", "export", "log.parquet", cwd=own)
    import pandas as pd

    log = pd.read_parquet(own / "log.parquet").set_index("prediction_id")
    assert len(log) == 91
    row = log.loc[both["prediction_id"]]
    assert (row["predicted"], len(row["probabilities"])) == ("cross+disc", 2)
    assert said.decode() in {*labels, "unsure"}

    (window,) = told("watch", "--minutes", "60", cwd=own)["windows"]
    assert (window["window"]["judged"], window["window"]["malformed"]) == (91, 0)
    assert window["status"] in ("pass", "inconclusive")
    (classes,) = (shift for shift in window["shifts"] if shift["detector"] == "predicted_classes")
    assert classes["effect"] < 0.5

    _import_labels(own, both["prediction_id"], "moon+disc", refused="the model has no class 'moon'")
    # In another order it is the same answer: the task says so.
    _import_labels(own, both["prediction_id"], "disc+cross")
    (seen,) = told("windows", cwd=own)["windows"]
    assert (seen["realised_accuracy"]["value"], seen["realised_accuracy"]["n"]) == (1.0, 1)


def _import_labels(own: Path, prediction: str, label: str, *, refused: str = "") -> None:
    file = own.parent / "labels.csv"
    file.write_text(f"prediction_id,label\n{prediction},{label}\n")
    done = visionloop("labels", "import", str(file), "--as", "bob", cwd=own)
    assert (done.returncode, refused in done.stderr) == (2 if refused else 0, True), done.stderr
