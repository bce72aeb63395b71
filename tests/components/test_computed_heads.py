"""Heads that are computed: against the same mathematics written out, and what a training of a few pictures comes to."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from shapes import KINDS, picture
from small_splits import NETWORK, write_small_splits

from components import computed_heads, plugins
from components.checkpoints import restore
from components.computed_heads import MOST_ROWS, Computed, compute
from components.contracts.data import Splits
from components.contracts.errors import ConfigError
from components.contracts.models import Checkpoint
from components.contracts.records import Stored
from components.phases import Phase
from components.store import describe
from components.training import TrainingConfig, check, train

TASK = plugins.load("tasks", "classification")
HEAD: dict[str, object] = {"trains": "head", "head": "auto"}


def clouds(
    counts: tuple[int, ...], dim: int = 30, *, spread: float = 1.0
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(len(counts)), counts)
    return 5 + rng.normal(size=(len(counts), dim))[labels] + spread * rng.normal(size=(len(labels), dim)), labels


def written_out(rows: Any, labels: Any, strength: float) -> Any:
    """Logits of any rows by class means (strength 0) or ridge regression, every class of the same weight."""
    num = int(labels.max()) + 1
    if strength == 0:
        means = np.array([rows[labels == k].mean(axis=0) for k in range(num)])
        return lambda asked: asked @ means.T - (means**2).sum(axis=1) / 2
    targets = np.eye(num)[labels]
    weights = (targets / np.bincount(labels)).sum(axis=1) / num
    mean = weights @ rows
    centred = rows - mean
    scatter = (centred * weights[:, None]).T @ centred
    ridge = strength * np.trace(scatter) * np.eye(rows.shape[1])
    found = np.linalg.solve(scatter + ridge, (centred * weights[:, None]).T @ (targets - 1 / num))
    return lambda asked: 1 / num + (asked - mean) @ found


def gaps(logits: Any) -> Any:
    """What of logits says something: their differences."""
    return logits - logits.mean(axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ["prototype", "linear"])
def test_a_head_and_what_is_left_out_are_what_the_textbook_says(kind: Any) -> None:
    plain, labels = clouds((7, 4, 9), spread=1.5)
    views = [plain, plain + 0.3 * np.random.default_rng(1).normal(size=plain.shape)]
    head = compute(views, labels, kind, TASK)
    assert (head.strength == 0) == (kind == "prototype")
    rows, owner = np.concatenate(views), np.tile(np.arange(len(labels)), 2)
    whole = written_out(rows, labels[owner], head.strength)(plain)
    ranked = np.sort(whole, axis=1)
    unit = (ranked[:, -1] - ranked[:, -2]).mean()
    np.testing.assert_allclose(gaps(head.logits(plain)), gaps(whole) / unit, atol=1e-9)
    assert head.left_out.tolist() == list(range(20))
    for place in (0, 8, 19):
        # No view of a picture that is left out takes part.
        others = owner != place
        alone = written_out(rows[others], labels[owner][others], head.strength)(plain[[place]])
        np.testing.assert_allclose(gaps(head.answers[[place]]), gaps(alone) / unit, atol=1e-9)


def test_what_is_chosen_does_best_on_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, labels = clouds((12, 12), 6, spread=0.6)
    plain[:, 0] += 40 * np.random.default_rng(2).normal(size=24)  # says nothing, and is all that means see
    chosen = compute([plain], labels, "auto", TASK)
    means = compute([plain], labels, "prototype", TASK)
    assert chosen.strength > 0
    right = [float((each.answers.argmax(axis=1) == labels).mean()) for each in (chosen, means)]
    assert right[0] > right[1] + 0.2, right
    # What is better by chance is not taken.
    losses = {None: np.array([0.5, 0.3, 0.4, 0.4]), 0.1: np.array([0.1, 0.45, 0.4, 0.5])}
    assert computed_heads._best(losses) is None
    assert computed_heads._best({0.1: losses[0.1], 1.0: losses[0.1] + 1}) == 0.1
    assert computed_heads._best({None: losses[0.1] + 0.3, 0.1: losses[0.1]}) == 0.1
    monkeypatch.setattr(computed_heads, "_ONE_BY_ONE", 5)
    parts = [part.tolist() for part in computed_heads._parts(np.arange(24), labels)]
    assert sorted(place for part in parts for place in part) == list(range(24))
    assert max(np.bincount(labels[part]).max() for part in parts) <= 2
    in_parts = compute([plain], labels, "auto", TASK)
    assert in_parts.answers.shape == chosen.answers.shape


def test_a_class_of_one_picture_is_never_left_out() -> None:
    plain, labels = clouds((1, 5), spread=0.3)
    head = compute([plain], labels, "auto", TASK)
    assert head.left_out.tolist() == [1, 2, 3, 4, 5]
    assert (head.logits(plain).argmax(axis=1) == labels).all()
    alone, labels = clouds((1, 1, 1))
    head = compute([alone, alone], labels, "auto", TASK)
    assert (head.strength, len(head.left_out)) == (0.0, 0)
    assert (head.logits(alone).argmax(axis=1) == labels).all()
    same = compute([np.ones((4, 3))], np.array([0, 0, 1, 1]), "auto", TASK)  # nothing tells them apart
    assert np.isfinite(same.weight).all()
    assert np.isfinite(same.answers).all()


def test_a_head_that_is_no_linear_layer_and_too_many_pictures_are_refused() -> None:
    head = Computed(np.zeros((2, 3)), np.zeros(2), 0.0, np.zeros(0, dtype=np.int64), np.zeros((0, 2)))
    for other in (torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))):
        with pytest.raises(
            ConfigError, match="one linear layer of 2 answers with a bias, and the head of this task is anoth"
        ):
            head.put_into(other)
    many = np.zeros((MOST_ROWS // 2 + 1, 2))
    with pytest.raises(ConfigError, match=r"pictures in 2 views are more than the 2000 rows .*; leave `head` out"):
        compute([many, many], np.arange(len(many)) % 2, "auto", TASK)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Stored[Splits]]:
    root = tmp_path_factory.mktemp("world")
    return root, write_small_splits(root)


def phased(*phases: Mapping[str, object], **changes: object) -> TrainingConfig:
    values = {"backbone": "small_cnn", "backbone_settings": NETWORK, "weights": "start.safetensors", "phases": phases}
    return TrainingConfig.model_validate_json(json.dumps(values | changes), strict=True)


def few(world: tuple[Path, Stored[Splits]], folder: Path, per_class: int, num_valid: int = 0) -> Stored[Splits]:
    """So many train pictures of each class."""
    folder.mkdir()
    table = pd.read_parquet(world[0] / "splits.parquet")
    train_set = table[table["split"] == "train"].groupby("label").head(per_class)
    valid = table[table["split"] == "valid"].groupby("label").head(num_valid)
    pd.concat([train_set, valid]).to_parquet(folder / "splits.parquet")
    told = {"counts": {"train": len(train_set), "valid": len(valid)}}
    described = describe(folder / "splits.parquet", within=folder)
    return Stored(world[1].record.model_copy(update={**told, "table": described}), folder)


def _trained(root: Path, splits: Stored[Splits], out: Path, config: TrainingConfig, **given: Any) -> Stored[Checkpoint]:
    out.mkdir()
    made = train(splits, root / "data", config, out=out, cache=root / "cache", root=root, num_threads=1, **given)
    return Stored(made, out)


@pytest.mark.parametrize(("per_class", "num_valid"), [(5, 0), (1, 0), (5, 2), (1, 2)])
def test_a_few_pictures_make_a_checkpoint_like_any_other(
    world: tuple[Path, Stored[Splits]], tmp_path: Path, per_class: int, num_valid: int
) -> None:
    root, splits = world[0], few(world, tmp_path / "splits", per_class, num_valid)
    rows: list[tuple[int, dict[str, float]]] = []
    notes: list[str] = []

    class Sink:
        def log(self, step: int, values: Any) -> None:
            rows.append((step, dict(values)))

    phase = {**HEAD, "views": 3, "augmentations": [{"augmentation": "flip"}]}
    found = _trained(
        root, splits, tmp_path / "out", phased(phase), sink=Sink(), progress=lambda _, __, note="": notes.append(note)
    )
    (row,) = json.loads((tmp_path / "out" / "history.json").read_text())
    assert rows == [(1, row)]
    assert (found.record.epochs, found.record.best_epoch, row["epoch"]) == (1, 1, 1)
    assert row["left_out"] == (3 * per_class if per_class > 1 else 0)
    assert ("left_out_accuracy" in row) == (per_class > 1)
    assert ("valid_accuracy" in row) == (num_valid > 0)
    assert re.search(r"the head, computed in one step: (class means|ridge)", " ".join(notes))
    with torch.inference_mode():
        asked = np.stack([picture(KINDS[i % 3], 900 + i) for i in range(60)])[..., None]
        logits = restore(found)(torch.from_numpy(asked))[0].numpy()
    right = logits.argmax(axis=1) == np.arange(60) % 3
    assert right.mean() > (0.6 if per_class > 1 else 0.45), "random features tell the shapes apart a little"
    confidence = TASK.probabilities(logits, found.record.temperature).max(axis=1)
    if per_class > 1:
        assert abs(confidence.mean() - right.mean()) < 0.2, "it is about as sure as it is right"


def test_a_computed_head_may_be_where_other_phases_begin(world: tuple[Path, Stored[Splits]], tmp_path: Path) -> None:
    fit = {"epochs": 2, "batch_size": 8, "checkpoint_every_s": 0}
    both = phased(HEAD, {"trains": {"last": 1}, "fit": fit})
    found = _trained(world[0], world[1], tmp_path / "out", both)
    rows = json.loads((tmp_path / "out" / "history.json").read_text())
    assert [(row["epoch"], row["phase"], "ridge_strength" in row) for row in rows] == [
        (1, 1, True),
        (2, 2, False),
        (3, 2, False),
    ]
    assert found.record.best_epoch in (2, 3)
    splits = few(world, tmp_path / "few", 4)
    with pytest.raises(
        ConfigError, match="training.phases.1: the epoch of a fit is chosen on valid images, and there are none"
    ):
        _trained(world[0], splits, tmp_path / "none", both)


def test_what_has_no_effect_on_a_computed_head_is_refused(world: tuple[Path, Stored[Splits]]) -> None:
    root = world[0]
    check(phased(HEAD), root)
    for key, value, told in (
        ("fit", {"epochs": 3}, "fit has no effect with head: auto"),
        ("sampling", "balanced", "sampling has no effect"),
        ("loss", {"loss": "focal"}, "loss has no effect"),
        ("augmentations", [{"augmentation": "mixup"}], "augmentation mixup has no effect"),
        ("views", 3, "3 views of each picture would be the same"),
    ):
        with pytest.raises(ConfigError, match=f"^training.phases.0.*{told}"):
            check(phased({**HEAD, key: value}), root)
    with pytest.raises(ConfigError, match="phases.0.head: auto computes a head on frozen features; say trains: head"):
        check(phased({"trains": "all", "head": "auto"}), root)
    with pytest.raises(ConfigError, match="learns nothing"):
        check(phased(HEAD, weights="random"), root)
    with pytest.raises(ConfigError, match="from labels alone, and training.teacher has no effect on it"):
        check(phased(HEAD, teacher={"checkpoint": "there"}), root)
    with pytest.raises(ValidationError, match="'prototype', 'linear' or 'auto'"):
        phased({"trains": "head", "head": "mean"})
    assert "head" not in Phase(trains="head").to_json()
    assert Phase.model_validate_json(json.dumps(Phase(trains="head", head="auto").to_json())).head == "auto"
