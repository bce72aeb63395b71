"""A training of all kinds of phases that is killed again and again ends as one that never was."""

from __future__ import annotations

import json
import signal
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from killed import Moment, trainings
from safetensors.numpy import load_file
from small_splits import NETWORK, write_small_splits

from components.training import TrainingConfig

FIT = {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "checkpoint_every_s": 0}
PHASES = [
    {"trains": "head", "views": 3, "augmentations": [{"augmentation": "flip"}, {"augmentation": "rotation"}], "fit": FIT},
    {
        "trains": {"last": 2},
        "views": 2,
        "augmentations": [{"augmentation": "flip"}, {"augmentation": "mixup"}],
        "sampling": "balanced",
        "fit": FIT | {"ema_decay": 0.9, "schedule": "one_cycle", "clip_norm": 1.0, "layer_decay": 0.7},
    },
    {
        "trains": "all",
        "augmentations": [{"augmentation": "jitter"}, {"augmentation": "crop"}, {"augmentation": "cutmix"}],
        "loss": {"loss": "class_weighted"},
        "fit": FIT | {"optimizer": "sgd", "nesterov": True, "layer_decay": 0.5},
    },
    # Its features are those of a network that has trained: the same bits find the same cache.
    {"trains": "head", "fit": FIT},
]


def of_segments(folder: str) -> list[Moment]:
    """While pictures are cached: some views of a picture are there and others are not."""
    return [
        Moment("writing", f"cache/{folder}.safetensors"),
        Moment("renaming", f"cache/{folder}.safetensors", 2),
        Moment("renamed", f"cache/{folder}.safetensors", 2),
        Moment("writing", f"cache/{folder}.safetensors", 2),
    ]


def of_encoder() -> list[Moment]:
    return [
        Moment("writing", "cache/encoders/*/encoder.onnx"),
        Moment("renamed", "cache/encoders/*/encoder.onnx"),
    ]


def of_fit(phase: int) -> list[Moment]:
    """In the first step, in every part of a checkpoint, and at the end of the phase."""
    state, pointer = f"out/state-{phase}-*", f"out/progress-{phase}.json"
    return [
        Moment("step", f"{phase}/0/0"),
        Moment("writing", state),
        Moment("renamed", state),
        Moment("writing", pointer),
        Moment("renaming", pointer),
        Moment("renamed", pointer, 2),
        Moment("removing", state),
        Moment("writing", f"out/state-{phase}-00001-0000000-*"),
        Moment("step", f"{phase}/1/*", 2),
        Moment("writing", f"out/state-{phase}-00002-*"),
        Moment("renaming", pointer),
        Moment("removing", state),
    ]


MOMENTS = [
    *of_encoder(),
    *of_segments("features/*"),
    *of_fit(1),
    *of_encoder(),
    *of_segments("maps/*"),
    *of_fit(2),
    *of_segments("pictures/*"),
    *of_fit(3),
    *of_encoder(),
    *of_segments("features/*"),
    *of_fit(4),
    Moment("writing", "out/history.json"),
    Moment("renamed", "out/history.json"),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data-version"
    splits = write_small_splits(root)
    (root / "splits.json").write_text(json.dumps(splits.record.to_json()))
    return root


def cached(cache: Path) -> dict[tuple[str, str], list[bytes]]:
    """What the segments hold, by folder and picture."""
    found: dict[tuple[str, str], list[bytes]] = {}
    for path in sorted(cache.rglob("*.safetensors")):
        tensors = load_file(path)
        for picture, row in zip(tensors["names"], tensors["data"], strict=True):
            key = path.parent.relative_to(cache).as_posix(), picture.tobytes().hex()
            found.setdefault(key, []).append(row.tobytes())
    return found


@pytest.mark.slow
def test_a_training_that_is_killed_at_every_kind_of_moment_ends_in_the_same_bits(data: Path, tmp_path: Path) -> None:
    config = TrainingConfig.model_validate(
        {"backbone": "small_cnn", "backbone_settings": NETWORK, "weights": "start.safetensors", "phases": PHASES}
    )
    with trainings() as start:
        whole = start.attempt(config, data, tmp_path / "whole")
        assert whole.status == 0
        attempts = []
        for moment in MOMENTS:
            attempts.append(start.attempt(config, data, tmp_path / "killed", moment))
            assert attempts[-1].status == -signal.SIGKILL, moment
        attempts.append(start.attempt(config, data, tmp_path / "killed"))
        assert attempts[-1].status == 0
    for name in ("weights.safetensors", "history.json"):
        assert (tmp_path / "killed" / "out" / name).read_bytes() == (tmp_path / "whole" / "out" / name).read_bytes(), name
    # Every picture is cached once in every view, and to the same bits.
    kept = cached(tmp_path / "killed" / "cache")
    assert {len(rows) for rows in kept.values()} == {1}
    assert kept == cached(tmp_path / "whole" / "cache")
    # What was kept is made once: a kill costs the segment that was being written, or one step.
    done = [event for attempt in attempts for event in attempt.done]
    segments = Counter(where for what, where in done if what == "renamed" and fnmatchcase(where, "cache/*.safetensors"))
    assert set(segments.values()) == {1}
    steps = Counter(where for what, where in done if what == "step")
    once = [where for what, where in whole.done if what == "step"]
    assert set(steps) == set(once)
    assert len(once) == len(set(once)) == len(PHASES) * 2 * 3
    kills_in_fits = sum(moment.what == "step" or moment.where.startswith("out/") for moment in MOMENTS)
    assert sum(steps.values()) <= len(once) + kills_in_fits
