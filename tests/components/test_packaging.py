from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from components.contracts.releases import Release
from components.images import STATISTICS, appearance, decode, prepare
from components.int8_arithmetic import int8_arithmetic
from components.packaging import fit_threshold
from components.releases import GOLDEN, INT8_ARITHMETIC, REFERENCE
from components.store import Store


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
