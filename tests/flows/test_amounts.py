from __future__ import annotations

import re
from pathlib import Path

import pytest
from shapes import SMOKE

from components.contracts.data import DataVersion
from components.gates.accuracy import Gate as Accuracy
from components.gates.no_regression import Gate as NoRegression
from components.intervals import paired_interval, wilson
from flows.workspace.adding import notes_on
from flows.workspace.amounts import Missing, amounts
from flows.workspace.data import Added, Sides

RECIPE = SMOKE.replace("floor: 0.6", "floor: 0.9").replace("min_images: 5", "min_images: 15")


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "smoke.yaml").write_text(RECIPE.replace("min_images: 20", "min_images: 40"))
    return tmp_path


def test_the_fewest_images_are_those_with_which_a_gate_can_just_pass() -> None:
    for floor in (0.5, 0.9, 0.99):
        n = Accuracy(floor=floor).least().images
        assert n is not None
        assert wilson(n, n).low >= floor > wilson(n - 1, n - 1).low
    n = NoRegression(margin=0.02).least().images
    assert n is not None
    assert paired_interval(n, 0, 0, 0)[0] >= -0.02 > paired_interval(n - 1, 0, 0, 0)[0]
    assert Accuracy(floor=1 - 1e-12).least().images is None


def test_what_is_missing_is_told_by_gate_and_class_and_how_many_images_would_do(workspace: Path) -> None:
    [amount] = amounts({"cat": 10, "dog": 18}, 0.2, workspace=workspace)
    assert amount.recipe == "smoke"
    assert amount.missing == (
        Missing("accuracy", 28, 35),
        Missing("class_recall", 10, 15, "cat"),
        Missing("parity", 28, 40),
        Missing("no_regression", 28, 189, against_champion=True),
    )
    assert (amount.more_for_first, amount.more_for_successor) == (60, 805)
    told = amount.told()
    assert "28 test images can prove an accuracy of at most 0.879" in told
    assert "class_recall needs 15 test images of 'cat'" in told
    assert "a first model can pass with 60 more images added, and its successor with 805 more" in told


def test_parity_asks_for_test_images_of_engines_below_fp32_alone(workspace: Path) -> None:
    """Those in fp32 are compared on the images of valid and calibration as well, so few test images lack nothing."""
    recipe = workspace / "recipes" / "smoke.yaml"
    recipe.write_text(re.sub(r"    - \{target: openvino, precision: int8\}\n", "", recipe.read_text()))
    recipe.write_text(recipe.read_text().replace("serving: openvino-int8", "serving: onnxruntime-fp32"))
    [amount] = amounts({"cat": 18, "dog": 18}, 0.2, workspace=workspace)
    assert [one.gate for one in amount.missing] == ["no_regression"]


def test_of_ten_thousand_classes_a_few_are_named_and_the_others_counted(workspace: Path) -> None:
    counts = {f"class {number:04d}": 2 for number in range(10_000)}
    [amount] = amounts(counts, 0.2, workspace=workspace)
    told = amount.told()
    assert "class_recall needs 15 test images of 'class 0004'; class_recall lacks test images of 9995 more classes" in told
    assert "class 0005" not in told
    added = Added(
        version=DataVersion(dvc_hash="h", num_files=20_000, bytes=1, ledger_sha256="l"),
        num_found=20_000,
        num_copied=20_000,
        num_already_there=0,
        left_out=(),
        num_new_test=0,
        undecodable=(),
        refused={},
        class_counts=counts,
        sides=Sides(),
        test_counts=counts,
        test_share=0.2,
    )
    *notes, last = notes_on(added)
    assert (len(notes), last) == (5, "9995 more classes have fewer than 10 images")


def test_where_a_first_model_can_pass_its_successor_is_told_of_and_where_all_can_nothing_is(workspace: Path) -> None:
    [amount] = amounts({"cat": 40, "dog": 40}, 0.2, workspace=workspace)
    assert (amount.more_for_first, amount.more_for_successor) == (0, 545)
    assert "a successor can pass with 545 more images added" in amount.told()
    [amount] = amounts({"cat": 100, "dog": 100}, 0.2, workspace=workspace)
    assert amount.told() == ""


def test_a_floor_that_no_number_of_images_can_prove_is_told(workspace: Path) -> None:
    recipe = workspace / "recipes" / "smoke.yaml"
    recipe.write_text(RECIPE.replace("floor: 0.9}", "floor: 0.9999999999}"))
    [amount] = amounts({"cat": 100, "dog": 100}, 0.2, workspace=workspace)
    assert "accuracy can be passed with no number of test images" in amount.told()
    assert "cannot pass whatever is added" in amount.told()


def test_without_a_recipe_of_its_own_a_workspace_is_told_of_the_default_one(tmp_path: Path) -> None:
    [amount] = amounts({"cat": 0, "dog": 0}, 0.2, workspace=tmp_path)
    assert amount.recipe == "transfer"
    assert amount.told().startswith(
        "Without a test image nothing is proven. By the gates of recipe transfer, accuracy needs 22"
    )
