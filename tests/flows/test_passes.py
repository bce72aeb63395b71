"""A recipe with a pass, from the pictures to a registered version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from consoled import site
from shapes import stored, visionloop

from components.contracts.evidence import ClassCost, Flips, PassesCost
from components.contracts.models import Checkpoint, Engine
from components.contracts.records import Stored, canonical_json
from components.contracts.verdicts import Evaluation
from components.intervals import paired_difference
from components.optimisation import OptimisationConfig
from components.pass_costs import cost_by_class
from flows.training.keys import compared_engine

PASSES = "optimisation={passes: [{pass: prune, settings: {share: 0.4, steps: 2}}, {pass: quantisation_aware}]}"
TRAIN = (
    "train",
    "-r",
    "smoke",
    "--set",
    PASSES,
    "--set",
    "gating.gates=[{gate: accuracy, settings: {floor: 0.5}}, {gate: parity, settings: {min_images: 20, min_proven: 0.5, min_agreement: {int8: 0.8}}}]",
)


@pytest.fixture(scope="module")
def pruned(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A workspace in which the same recipe ran without a pass before, and what the run with one said."""
    import shutil

    root = Path(shutil.copytree(trained, tmp_path_factory.mktemp("pruned") / "workspace", symlinks=True))
    plan = visionloop(*TRAIN, "--dry-run", cwd=root)
    assert "[3/9] training: from the store\n[3/9] optimisation: computed\n" in plan.stdout, plan.stdout + plan.stderr
    done = visionloop(*TRAIN, "--json", cwd=root)
    assert done.stdout.strip(), done.stderr
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert "outcome" in summary, (summary, done.stderr)
    return root, summary


def test_a_pruned_network_goes_through_the_same_stages_and_gates(pruned: tuple[Path, dict[str, Any]]) -> None:
    root, summary = pruned
    assert summary["outcome"] == "candidate", summary["reasons"]
    assert summary["seconds"]["training"]["cached"]
    assert not summary["seconds"]["optimisation"]["cached"]
    run = Path(summary["run_folder"])
    assert (run / "3-training").exists()
    checkpoint = Checkpoint.read(json.loads((run / "3-optimisation" / "manifest.json").read_text())["record"])
    assert checkpoint.optimised is not None
    assert checkpoint.optimised.made_of == stored(root, "training", Checkpoint).record.digest()
    assert checkpoint.optimised.passes[0].after.parameters <= 0.6 * checkpoint.optimised.passes[0].before.parameters
    for finding in summary["findings"]:
        assert finding["status"] == "pass", finding
    sizes = {name: engine["size_bytes"] for name, engine in summary["engines"].items()}
    before = json.loads((root / "summary.json").read_text())["engines"]
    assert sizes["onnxruntime-fp32"] < 0.75 * before["onnxruntime-fp32"]["size_bytes"]
    assert sizes["openvino-int8"] < before["openvino-int8"]["size_bytes"]
    plan = visionloop(*TRAIN, "--dry-run", cwd=root)
    assert "[3/9] training: from the store\n[3/9] optimisation: from the store\n" in plan.stdout


def test_what_a_pass_cost_and_bought_stands_where_a_person_decides(pruned: tuple[Path, dict[str, Any]]) -> None:
    root, summary = pruned
    told = summary["optimisation"]
    cost = told["cost"]
    num_test = summary["data"]["splits"]["test"]
    assert cost["engine"] == "openvino-int8"  # what the pass for int8 won would not be seen in fp32
    assert cost["difference"]["n"] == num_test == sum(each["difference"]["n"] for each in cost["classes"])
    accuracy = summary["engines"]["openvino-int8"]["metrics"]["accuracy"]["value"]
    before = json.loads((root / "summary.json").read_text())["engines"]["openvino-int8"]["metrics"]["accuracy"]["value"]
    assert cost["difference"]["value"] == pytest.approx(accuracy - before)
    assert cost["lost"] - cost["won"] == round((before - accuracy) * num_test)
    assert cost["speedup"]["low"] <= cost["speedup"]["value"] <= cost["speedup"]["high"]
    assert cost["engine_bytes_after"] < cost["engine_bytes_before"]
    run = Path(summary["run_folder"])
    assert sorted(path.name for path in (run / "unoptimised" / "4-export").iterdir()) == ["graph", "openvino-int8"]
    # What ran without the pass had built the same engine already.
    assert summary["seconds"]["export openvino-int8 unoptimised"]["cached"]
    cards = [path.read_text() for path in (root / ".visionloop" / "mlflow-artifacts").rglob("model-card.md")]
    assert {"## What was optimised" in text for text in cards} == {True, False}  # the run before had no pass
    sizes = told["passes"][0]
    line = f"parameters {sizes['before']['parameters']:,} to {sizes['after']['parameters']:,} (-4"
    shown = visionloop("show", summary["version"], cwd=root).stdout
    for text in (*(text for text in cards if "optimised" in text), shown):
        assert line in text
        assert f"(n={num_test}, image by image)" in text
        assert "p50 of a single image" in text
        assert "as it was, rounded to int8, right answers to valid images change by" in text
    report = (run / "report.html").read_text()
    assert "<h2>Optimisation</h2>" in report
    assert f"{sizes['after']['macs']:,}" in report
    assert report.count("class, on test as openvino-int8") == 1
    assert "valid accuracy, int8 before" in report
    bound = json.loads(visionloop("show", summary["version"], "--json", cwd=root).stdout)["bound"]
    assert len(bound["unoptimised"]) == 64


def test_the_console_shows_what_was_optimised(pruned: tuple[Path, dict[str, Any]]) -> None:
    root, summary = pruned
    with site(root) as found:
        page = found.client().get(f"/models/shapes/versions/{summary['version']}").text
    assert '<h2 id="passes">What was optimised</h2>' in page
    assert f"{summary['optimisation']['passes'][0]['after']['parameters']:,}" in page
    assert "valid accuracy, int8 before" in page


def test_what_is_not_asked_is_said(pruned: tuple[Path, dict[str, Any]]) -> None:
    root, summary = pruned
    from flows.training.passes_told import lines

    told = {**summary["optimisation"], "cost": None}
    assert lines(told, "accuracy")[-1] == "what the passes cost on test was not asked (optimisation.compare is false)"
    done = visionloop(*TRAIN, "--set", "optimisation.compare=false", "--json", cwd=root)
    other = json.loads(done.stdout.strip().splitlines()[-1])
    assert other["optimisation"]["cost"] is None
    assert other["seconds"]["optimisation"]["cached"]
    assert not (Path(other["run_folder"]) / "unoptimised").exists()


@pytest.mark.parametrize(
    ("passes", "away", "compared"),
    [
        (["prune"], [], "onnxruntime-fp32"),
        (["prune", "quantisation_aware"], [], "openvino-int8"),
        (["quantisation_aware"], ["openvino-int8"], "onnxruntime-fp32"),
        (["prune"], ["onnxruntime-fp32"], "torch_reference"),
    ],
)
def test_networks_are_compared_as_the_engines_that_the_passes_are_for(
    passes: list[str], away: list[str], compared: str, tmp_path: Path
) -> None:
    engines, evaluations = [], []
    for name, precision in (("torch_reference", "fp32"), ("onnxruntime-fp32", "fp32"), ("openvino-int8", "int8")):
        status = "not executed here" if name in away else "evaluated"
        engines.append(Stored(Engine.model_construct(name=name, precision=precision), tmp_path))
        evaluations.append(Stored(Evaluation.model_construct(engine=name, status=status), tmp_path))
    config = OptimisationConfig.model_validate({"passes": [{"pass": name} for name in passes]})
    engine, evaluation = compared_engine(engines, evaluations, config.compared_in)
    assert engine.record.name == evaluation.record.engine == compared


def told_of(lost: dict[str, tuple[int, int]], **changes: Any) -> dict[str, Any]:
    """What the ledger holds of a pass that lost so many of so many right answers to each class."""
    from flows.training.passes_told import _cost_json

    labels = [name for name, (_, n) in lost.items() for _ in range(n)]
    right = np.concatenate([np.arange(n) >= gone for gone, n in lost.values()])
    was = np.ones(len(right), dtype=bool)
    gone, difference = int((~right).sum()), paired_difference(right, was)
    values: dict[str, Any] = {
        "engine": "onnxruntime-fp32",
        "engine_digest": "e",
        "before_digest": "b",
        "test_digest": "t",
        "answers": Flips(both=len(right) - gone, won=0, lost=gone, neither=0, difference=difference),
        "by_class": cost_by_class(right, was, labels),
        "p50_before_ms": None,
        "p50_after_ms": None,
        "speedup": None,
        "machine": "",
        "engine_bytes_before": 2,
        "engine_bytes_after": 1,
        "notes": (),
    }
    return {"passes": [], "cost": _cost_json(PassesCost(**(values | changes)))}


RARE = {f"rare {i:02d}": (1, 4) for i in range(60)}


def test_a_class_that_is_shown_to_be_worse_is_told_before_those_that_lost_more() -> None:
    from flows.training.passes_told import lines, page

    told = told_of(RARE | {"common": (60, 300)})
    assert "shown to be worse, after Holm's correction for 61 classes: common by 0.2000 (n=300)" in lines(told, "accuracy")
    shown = page(told, "accuracy")
    assert shown is not None
    assert [(each["name"], each["worse"]) for each in shown["classes"][:2]] == [("common", True), ("rare 00", False)]
    assert (len(shown["classes"]), shown["num_classes"]) == (30, 61)
    many = told_of({f"common {i:02d}": (60, 300) for i in range(32)})
    assert [line.rpartition(", ")[2] for line in lines(many, "accuracy") if "shown" in line] == ["and 2 more"]


def test_a_class_is_shown_to_be_worse_by_what_is_left_of_it_among_all() -> None:
    """By its own interval it would be; records of before the correction show none, and keep their digests."""
    from flows.training.passes_told import lines, page

    alone, among = told_of({"one": (6, 60)}), told_of({"one": (6, 60)} | {f"other {i}": (0, 60) for i in range(9)})
    (one,) = (each for each in among["cost"]["classes"] if each["name"] == "one")
    assert one["difference"]["high"] < 0
    assert any(line.startswith("shown to be worse, after Holm's correction for 1 class: one") for line in lines(alone, ""))
    assert "none of 10 classes is shown to be worse, after Holm's correction for all of them" in lines(among, "")
    before = ClassCost(
        name="one", before=1.0, after=0.9, difference=paired_difference(np.arange(60) > 5, np.arange(60) >= 0)
    )
    assert "p_worse" not in canonical_json(before.to_json())
    old = told_of({"one": (6, 60)}, by_class=(before,))
    shown = page(old, "")
    assert shown is not None
    assert not shown["classes"][0]["worse"]
    assert not [line for line in lines(old, "") if "worse" in line]


def test_valid_chose_the_epochs_of_what_was_fine_tuned() -> None:
    from flows.training.passes_told import lines

    size = {"parameters": 9, "macs": 9, "zeros": 0, "stored_bytes": 9}
    one = {"name": "p", "settings": {}, "before": size, "after": size, "valid": [8, 1, 1, 0], "notes": []}
    told = lines({"passes": [one | {"epochs": 0}, one | {"epochs": 2}], "cost": None}, "accuracy")
    assert [line[line.rindex("(") :] for line in told[:2]] == ["(n=10)", "(n=10, which chose its epochs)"]
