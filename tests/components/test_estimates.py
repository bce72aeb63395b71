from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest
from shapes import KINDS
from small_splits import NETWORK, write_small_splits

from components.contracts.data import Splits
from components.contracts.errors import WeightsUnavailable
from components.contracts.records import Stored
from components.estimates import Images, PhaseEstimate, estimate
from components.training import TrainingConfig, train
from components.weights import download, without_downloads

FIT = {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "checkpoint_every_s": 0}
FLIPPED: Mapping[str, object] = {"views": 2, "augmentations": [{"augmentation": "flip"}]}


def config(*phases: Mapping[str, object], **changes: object) -> TrainingConfig:
    values = {
        "backbone": "small_cnn",
        "backbone_settings": NETWORK,
        "weights": "start.safetensors",
        "phases": [{"fit": FIT, **phase} for phase in phases],
    }
    return TrainingConfig.model_validate_json(json.dumps(values | changes), strict=True)


@pytest.fixture
def world(tmp_path: Path) -> tuple[Path, Images, Stored[Splits]]:
    """A workspace with 24 train and 12 valid images, and weights to start from."""
    splits = write_small_splits(tmp_path)
    table = pd.read_parquet(tmp_path / "splits.parquet")
    train, valid = (
        [(tmp_path / "data" / str(row["path"]), str(row["picture"])) for _, row in table[table["split"] == name].iterrows()]
        for name in ("train", "valid")
    )
    return tmp_path, Images(KINDS, train, valid, 24, 12, split=True), splits


def estimated(root: Path, images: Images, section: TrainingConfig) -> list[PhaseEstimate]:
    scratch = root / f"scratch-{len(list(root.iterdir()))}"
    scratch.mkdir()
    return estimate(section, images, cache=root / "cache", root=root, num_threads=1, scratch=scratch)


@pytest.mark.slow
def test_what_a_training_keeps_is_found_and_the_rest_is_timed(world: tuple[Path, Images, Stored[Splits]]) -> None:
    root, images, splits = world
    phases = (
        {"trains": "head"},
        {"trains": {"last": 1}, **FLIPPED},
        {"trains": "all"},
        {"trains": "all"},
        {"trains": "head"},
    )
    before = estimated(root, images, config(*phases))
    assert not (root / "cache").exists()
    assert [(phase.kind, phase.num_rows, phase.num_cached) for phase in before] == [
        ("features", 36, 0),
        ("maps", 24 * 2 + 12, 0),
        ("pictures", 36, 0),
        ("pictures", 36, 36),  # by then the phase before has made them
        ("features", 36, None),
    ]
    assert before[4].unknown == "an earlier phase changes what they are made by"
    assert all(phase.num_steps_timed >= 2 and (phase.seconds or 0) > 0 for phase in before)
    assert [bool(phase.num_rows_timed) for phase in before] == [True, True, True, False, True]
    out = root / "out"
    out.mkdir()
    train(splits, root / "data", config(*phases[:3]), out=out, cache=root / "cache", root=root, num_threads=1)
    kept = {path: path.stat().st_mtime_ns for path in (root / "cache").rglob("*")}
    after = estimated(root, images, config(*phases))
    assert [(phase.num_cached, phase.num_rows_timed, phase.rows_s) for phase in after[:3]] == [
        (36, 0, 0),
        (60, 0, 0),
        (36, 0, 0),
    ]
    assert {path: path.stat().st_mtime_ns for path in (root / "cache").rglob("*")} == kept
    # A picture that came later costs itself, in all views.
    fewer = next((root / "cache" / "maps").rglob("*.safetensors"))
    fewer.unlink()
    assert [phase.num_cached for phase in estimated(root, images, config(*phases[:2]))] == [
        36,
        60 - (24 if _second(fewer) else 36),
    ]


def _second(path: Path) -> bool:
    return path.parent.name != "as-it-is"


def test_seconds_are_those_of_what_is_missing_and_of_all_epochs(world: tuple[Path, Images, Stored[Splits]]) -> None:
    root, images, _ = world
    (found,) = estimated(root, images, config({"trains": "head"}))
    told = dataclasses.replace(
        found, num_rows=100, num_cached=40, row_s=0.5, epochs=3, num_steps=4, step_s=0.25, valid_s=0.125
    )
    assert (told.rows_s, told.fit_s, told.seconds) == (30.0, 3 * (1.0 + 12 * 0.125), 37.5)
    assert dataclasses.replace(told, step_s=None).seconds is None


def test_what_is_not_split_is_estimated_and_weights_that_are_not_here_are_not_fetched(
    world: tuple[Path, Images, Stored[Splits]],
) -> None:
    root, images, _ = world
    some = Images(KINDS, [(path, "") for path, _ in images.train], (), 700, 100, split=False)
    (found,) = estimated(root, some, config({"trains": "head", **FLIPPED}))
    assert (found.num_train, found.num_rows, found.num_cached, found.num_steps) == (700, 1500, None, 88)
    assert found.unknown == "which images train is known when they are validated and split"
    assert (found.seconds or 0) > 0
    champion = config({"trains": {"last": 1}}, weights="champion")
    assert estimated(root, images, champion)[0].unknown == "the champion that it goes on from is looked up by the run"
    with without_downloads(), pytest.raises(WeightsUnavailable, match="x.safetensors is not downloaded yet"):
        download("https://example.invalid/x.safetensors", sha256="", cache=root / "cache")
