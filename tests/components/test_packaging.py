from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from tasks_of_tests.several_labels import Task as SeveralLabels

from components.contracts.data import DataVersion, Splits
from components.contracts.errors import ConfigError, UnknownName
from components.contracts.families import Task
from components.contracts.records import FileDigest
from components.contracts.releases import NEVER, CriticalClass, DecisionRule, Release
from components.images import STATISTICS, appearance, decode, prepare
from components.int8_arithmetic import int8_arithmetic
from components.intervals import wilson
from components.packaging import PackagingConfig, expect_provable, fit_critical, fit_threshold, rule_of
from components.releases import GOLDEN, INT8_ARITHMETIC, REFERENCE
from components.store import Store
from components.tasks.classification import Task as Classification


def fit(confidence: list[float], correct: list[bool], target: float, minimum: float = 0.0) -> float:
    return fit_threshold(np.array(confidence), np.array(correct), target, minimum)


def test_the_threshold_is_the_smallest_that_reaches_the_target() -> None:
    confidence = [0.9, 0.8, 0.7, 0.6, 0.5]
    assert fit(confidence, [True, True, True, False, True], 1.0) == 0.7
    assert fit(confidence, [True, True, True, False, True], 0.8) == 0.5
    assert fit(confidence, [True, True, True, True, False], 0.9) == 0.6


def test_equal_confidences_are_answered_together_or_not_at_all() -> None:
    assert fit([0.9, 0.7, 0.7, 0.7], [True, True, False, True], 1.0) == 0.9


def test_a_model_that_is_never_right_answers_only_certainty() -> None:
    assert fit([0.9, 0.8], [False, False], 0.5) == 1.0


def test_the_threshold_is_never_under_the_minimum() -> None:
    assert fit([0.9, 0.3], [True, True], 0.9, 0.5) == 0.5


def test_no_images_fit_no_threshold() -> None:
    with pytest.raises(ValueError, match="no images"):
        fit([], [], 0.9)


OTHERS = 400
"""Pictures of other classes, of which the upper limit of 2 is 1.8 % and that of 3 is 2.2 %."""


def critical(false: list[float], true: list[float], rate: float) -> float:
    """The threshold where pictures of other classes, and of the class, are answered as the class so surely."""
    confidence = np.array([*false, *true, *[0.99] * (OTHERS - len(false))])
    claimed = np.arange(len(confidence)) < len(false) + len(true)
    own = claimed & (np.arange(len(confidence)) >= len(false))
    return fit_critical(confidence, claimed, own, rate, 0.5)


@pytest.mark.parametrize(
    ("false", "true", "rate", "threshold"),
    [
        ([0.9, 0.8, 0.7], [0.95, 0.75, 0.6], 0.02, 0.75),
        ([0.9, 0.8, 0.7], [0.95, 0.75, 0.6], 0.03, 0.5),
        ([0.9, 0.8, 0.7], [0.95, 0.75, 0.6], 0.01, 0.95),
        ([0.9, 0.8, 0.4], [0.95, 0.75, 0.6], 0.02, 0.5),
        # Equal confidences are answered together or not at all.
        ([0.9, 0.8, 0.7], [0.95, 0.7, 0.6], 0.02, 0.8),
        ([1.0, 1.0, 1.0], [1.0, 0.9], 0.02, NEVER),
        ([], [0.6], 0.01, 0.5),
    ],
)
def test_a_critical_class_is_sure_from_where_the_whole_interval_keeps_the_rate(
    false: list[float], true: list[float], rate: float, threshold: float
) -> None:
    found = critical(false, true, rate)
    assert found == threshold
    assert wilson(sum(share >= found for share in false), OTHERS).high <= rate


def test_a_rate_that_the_images_cannot_prove_fits_no_threshold() -> None:
    with pytest.raises(ValueError, match="400 images of other classes cannot prove a rate of 0.009"):
        critical([], [0.6], 0.009)


def splits_of(**valid: int) -> Splits:
    labels, file = tuple(sorted(valid)), FileDigest(name="splits.parquet", sha256="0" * 64, bytes=1)
    return Splits(
        data=DataVersion(dvc_hash="h", num_files=1, bytes=1, ledger_sha256="l"),
        table=file,
        classes=labels,
        counts={"train": 1, "valid": sum(valid.values()), "calibration": 1, "test": 1},
        class_counts={"train": {}, "valid": valid, "calibration": {}, "test": {}},
        num_duplicate_groups=0,
        test_digest="t",
    )


@pytest.mark.parametrize("task", [Classification(), SeveralLabels()])
def test_a_recipe_is_refused_whose_critical_classes_valid_cannot_speak_for(task: Task) -> None:
    splits = splits_of(crack=900, good=180, scratch=201)
    expect_provable(PackagingConfig(critical={"crack": 0.01, "good": 0.005}), splits, task)
    with pytest.raises(UnknownName, match=r"class in packaging.critical 'crak'; valid: crack, good, scratch"):
        expect_provable(PackagingConfig(critical={"crak": 0.01}), splits, task)
    with pytest.raises(ConfigError, match=r"at most 1 % .* by 380 valid pictures of other classes.*it takes 381\. Add"):
        expect_provable(PackagingConfig(critical={"crack": 0.01}), splits_of(crack=900, good=180, scratch=200), task)
    with pytest.raises(ConfigError, match="by 0 valid pictures of other classes"):
        expect_provable(PackagingConfig(critical={"crack": 0.01}), splits_of(crack=900), task)
    for rate in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"critical\.crack"):
            PackagingConfig(critical={"crack": rate})


def test_a_picture_of_several_labels_is_of_each_class_that_it_names() -> None:
    splits = splits_of(**{"crack+good": 300, "good": 200, "crack": 100})
    with pytest.raises(ConfigError, match="by 200 valid pictures of other classes"):
        expect_provable(PackagingConfig(critical={"crack": 0.01}), splits, SeveralLabels())


def answers_of(task: Task) -> pd.DataFrame:
    """Of valid and of test 500 pictures each: 100 of `crack`, and of the others 2 that are answered `crack` too surely."""
    own = pd.DataFrame({"label": "crack", "predicted": "crack", "confidence": [0.97] * 50 + [0.7] * 50})
    false = pd.DataFrame({"label": "good", "predicted": "crack", "confidence": [0.9, 0.8]})
    good = pd.DataFrame({"label": "good", "predicted": "good", "confidence": [0.8] * 398})
    one = pd.concat([own, false, good], ignore_index=True)
    both = pd.concat([one.assign(split=name) for name in ("valid", "test")], ignore_index=True)
    return both.assign(right=both["label"] == both["predicted"])


@pytest.mark.parametrize("task", [Classification(), SeveralLabels()])
def test_answers_of_a_critical_class_need_its_own_threshold_and_the_price_is_told(task: Task) -> None:
    config = PackagingConfig(target_accuracy=0.9)
    plain = rule_of(answers_of(task), config, task)
    rule = rule_of(answers_of(task), config.model_copy(update={"critical": {"crack": 0.01}}), task)
    assert (plain.threshold, plain.coverage.value) == (rule.threshold, 1.0) == (0.7, 1.0)
    (found,) = rule.critical
    assert (found.threshold, found.valid, found.test) == (0.97, wilson(0, 400), wilson(0, 400))
    assert found.found == wilson(50, 100)
    # Fifty cracks and both false ones are unsure now, and nothing of the other class is.
    assert (rule.coverage, rule.accuracy) == (wilson(448, 500), wilson(448, 448))
    assert found.told() == (
        "Critical class 'crack' is a sure answer from confidence 0.9700 on. Of the pictures of other classes at most 1 % may "
        "be answered so: 0.00% [0.00%, 0.95%] (n=400) in test, kept; of its own test pictures 50.00% [40.38%, 59.62%] "
        "(n=100) are found so"
    )
    missed = found.model_copy(update={"threshold": NEVER, "test": wilson(20, 400), "found": None})
    assert "is never a sure answer, as no threshold keeps the rate" in missed.told()
    assert missed.told().endswith("in test, not kept")
    undecided = found.model_copy(update={"test": wilson(3, 400), "found": None})
    assert undecided.told().endswith("in test, not decided by these test pictures")
    assert found.model_copy(update={"test": None, "found": None}).told().endswith("there was none in test")


def test_without_valid_images_the_threshold_is_the_least_that_it_may_be() -> None:
    answers = answers_of(Classification())
    of_test = answers.assign(split="test")
    rule = rule_of(of_test, PackagingConfig(min_confidence=0.6), Classification())
    assert (rule.threshold, rule.num_valid) == (0.6, 0)
    assert rule.coverage.n == len(of_test)


def test_records_without_critical_classes_are_written_as_before_there_were_any() -> None:
    rule = rule_of(answers_of(Classification()), PackagingConfig(), Classification())
    assert set(rule.to_json()) == {"schema_version", "threshold", "target_accuracy", "num_valid", "coverage", "accuracy"}
    assert set(PackagingConfig().to_json()) == {
        "schema_version",
        "target_accuracy",
        "min_confidence",
        "reference_images",
        "golden_images",
    }
    assert DecisionRule.read(rule.to_json()) == rule
    one = CriticalClass(
        name="crack", rate=0.01, threshold=NEVER, valid=wilson(0, 400), test=wilson(0, 400), found=wilson(0, 9)
    )
    other = rule.model_copy(update={"critical": (one,)})
    assert DecisionRule.read(json.loads(json.dumps(other.to_json()))) == other
    assert other.digest() != rule.digest()


@pytest.fixture(scope="module")
def released(trained: Path) -> tuple[Release, Path]:
    (folder,) = (trained / ".visionloop" / "store" / "packaging").iterdir()
    stored = Store(trained / ".visionloop" / "store").open("packaging", folder.name, Release)
    assert stored is not None
    return stored.record, stored.folder


def test_a_release_holds_its_files_and_no_training_image(released: tuple[Release, Path], trained: Path) -> None:
    record, folder = released
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"manifest.json"}
    assert names == {file.name for file in record.files}
    reference = pd.read_parquet(folder / REFERENCE)
    (table,) = (trained / ".visionloop" / "store" / "splitting").rglob("splits.parquet")
    splits = pd.read_parquet(table).set_index("sha256")["split"]
    assert set(splits[reference["image_sha256"]]) == {"test", "valid"}
    assert len(reference) == (splits == "test").sum() + (splits == "valid").sum()


def test_the_reference_is_what_the_serving_engine_answers(released: tuple[Release, Path], trained: Path) -> None:
    record, folder = released
    reference = pd.read_parquet(folder / REFERENCE)
    (table,) = (trained / ".visionloop" / "store" / "evaluation" / "openvino-int8").rglob("predictions.parquet")
    predictions = pd.read_parquet(table).set_index("sha256")
    test = reference[reference["split"] == "test"]
    assert (test["predicted"].to_numpy() == predictions.loc[test["image_sha256"], "predicted"].to_numpy()).all()
    assert np.stack(list(reference["embedding"])).shape == (len(reference), record.engine.embedding_dim)
    assert np.stack(list(reference["probabilities"])).sum(axis=1) == pytest.approx(1.0, abs=1e-5)
    files = {path.name: path for path in (trained / "data").rglob("*.png")}
    assert files
    path = Path(predictions.loc[test["image_sha256"].iloc[0], "path"])
    raw = (trained / "data" / path).read_bytes()
    row = test.iloc[0]
    looks = appearance(prepare(decode(raw), record.engine.preprocessing))
    assert [row[name] for name in STATISTICS] == pytest.approx(looks, abs=1e-6)
    assert (row["width"], row["height"], row["bytes"]) == (16, 16, len(raw))


def test_golden_vectors_decode_to_what_is_stored(released: tuple[Release, Path]) -> None:
    record, folder = released
    tensors = load_file(folder / GOLDEN)
    count = len(tensors["pixels"])
    assert count == 16
    assert set(np.unique(tensors["probabilities"].argmax(axis=1))) == {0, 1, 2}
    with safe_open(folder / GOLDEN, framework="numpy") as file:
        assert record.engine.precision == "int8"
        assert file.metadata() == {INT8_ARITHMETIC: int8_arithmetic()}
    for index in range(count):
        pixels = prepare(decode(tensors[f"encoded.{index:03d}"].tobytes()), record.engine.preprocessing)
        assert (pixels == tensors["pixels"][index]).all()


def test_the_approver_reads_the_decision_rule(released: tuple[Release, Path], trained: Path) -> None:
    from registry.ledger import Ledger

    (entry,) = Ledger(f"sqlite:///{trained / '.visionloop' / 'ledger.db'}").entries()
    assert entry.body["summary"]["decision"] == json.loads(json.dumps(released[0].decision.to_json()))
    assert entry.body["bound"]["release"] == released[0].digest()
    assert entry.actor.method == "declared"


def test_appearance_tells_dark_blurred_and_grey_pictures_apart() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (112, 112, 3), dtype=np.uint8)
    flat = np.full_like(picture, 128)
    brightness, contrast, sharpness, saturation = appearance(picture)
    assert 0.45 < brightness < 0.55
    assert min(contrast, sharpness, saturation) > 0.1
    assert appearance(flat) == pytest.approx((128 / 255, 0, 0, 0), abs=0.01)
    assert appearance(picture // 4)[0] < brightness / 3
    assert appearance(np.zeros((28, 28, 1), dtype=np.uint8)) == (0, 0, 0, 0)
