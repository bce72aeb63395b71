"""What is found in embeddings, probabilities and properties that a test made: label errors, outliers, spurious correlation."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from components import plugins
from components.contracts.families import Known
from components.contracts.issues import Issue
from components.out_of_fold import probabilities

Numbers = npt.NDArray[np.int64]


def known(labels: Numbers, embeddings: npt.NDArray[Any] | None = None, *, believed: bool = False, **columns: Any) -> Known:
    """Data of these classes; `believed` with the out-of-fold probabilities of the embeddings, which take a second."""
    n = len(labels)
    names = [f"c{number}" for number in labels]
    facts = {
        "path": [f"{name}/{row:05d}.jpg" for row, name in enumerate(names)],
        "label": names,
        "sha256": [f"{row:064x}" for row in range(n)],
        "picture": [f"{row:032x}" for row in range(n)],
        "bytes": 1000,
        "format": "JPEG",
        "mode": "RGB",
        "width": 64,
        "height": 48,
        "brightness": 0.5,
        "contrast": 0.2,
        "sharpness": 0.1,
    }
    table = pd.DataFrame({**facts, **columns})
    classes = tuple(sorted(set(names)))
    embeddings = None if embeddings is None else embeddings.astype(np.float32)
    found = None
    if believed:
        assert embeddings is not None
        found = probabilities(embeddings, names, classes, list(table["picture"]))
    return Known(table, table.iloc[:0], None, embeddings, found, classes)


def look(name: str, data: Known, **settings: Any) -> list[Issue]:
    found: list[Issue] = plugins.load("findings", name, settings).look(data)
    return found


def rows_of(issues: list[Issue]) -> list[int]:
    return [int(issue.files[0].split("/")[1].split(".")[0]) for issue in issues]


def clusters(n: int, *, num_classes: int = 8, spread: float = 0.45, seed: int = 0) -> tuple[Numbers, npt.NDArray[Any]]:
    """Classes, and embeddings around a centre for each class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, n)
    centres = np.abs(rng.normal(size=(num_classes, 24)))
    return labels, centres[labels] + spread * rng.normal(size=(n, 24))


def test_labels_that_were_changed_are_found_with_what_they_were() -> None:
    truth, embeddings = clusters(2000, spread=0.35)
    rng = np.random.default_rng(1)
    changed = rng.random(2000) < 0.05
    labels = np.where(changed, (truth + rng.integers(1, 8, 2000)) % 8, truth)
    issues = look("label_error", known(labels, embeddings, believed=True))
    rows = np.array(rows_of(issues))
    assert changed[rows].sum() >= 0.9 * changed.sum()
    assert changed[rows].mean() >= 0.75
    of_changed = [issue.candidate == f"c{truth[row]}" for issue, row in zip(issues, rows, strict=True) if changed[row]]
    assert np.mean(of_changed) > 0.95
    assert [issue.score for issue in issues] == sorted(issue.score for issue in issues)
    assert issues[0].threshold == issues[-1].score
    assert issues[0].severity == "warning"
    assert f"labelled c{labels[rows[0]]}, looks like {issues[0].candidate}" in issues[0].detail


def test_labels_that_are_right_are_left_alone() -> None:
    labels, embeddings = clusters(2000)
    labels[:3] = 8  # a class of three beside classes of hundreds, which no head can know
    rows = rows_of(look("label_error", known(labels, embeddings, believed=True)))
    assert len(rows) <= 20
    assert 8 not in labels[rows]


@pytest.mark.parametrize("seed", range(3))
def test_what_is_like_nothing_else_is_an_outlier(seed: int) -> None:
    labels, embeddings = clusters(900, spread=0.2, seed=seed)
    # Half of the classes are far more varied than the others, which makes no outliers of them.
    embeddings[labels < 4] += np.random.default_rng(seed).normal(size=embeddings.shape)[labels < 4] * 0.4
    assert len(look("outlier", known(labels, embeddings))) <= 3  # of 900: the last of a long tail
    # Two strange pictures, one of which is there twelve times: copies are no neighbours.
    copies, strange = list(range(600, 612)), -np.abs(embeddings[:2])
    embeddings[500], embeddings[copies] = strange
    pictures = [f"{600 if row in copies else row:032x}" for row in range(900)]
    issues = look("outlier", known(labels, embeddings, picture=pictures))
    assert {500, *copies} <= {*rows_of(issues)[:14]}
    assert len(issues) <= 16
    assert all(issue.score <= issue.threshold < 1 and "times as far" in issue.detail for issue in issues)


def test_a_few_pictures_and_a_rare_class_are_no_outliers() -> None:
    labels, embeddings = clusters(600, spread=0.2)
    labels[:6], embeddings[:6] = 8, -np.abs(embeddings[:6])
    assert look("outlier", known(labels, embeddings)) == []
    assert look("outlier", known(labels[:20], embeddings[:20])) == []


def test_a_property_that_gives_away_one_class_of_many_is_named_with_its_numbers() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 1500)
    brightness = rng.normal(0.5, 0.1, 1500)
    brightness[labels == 3] = rng.normal(0.9, 0.02, (labels == 3).sum())
    (issue,) = look("spurious_correlation", known(labels, brightness=brightness, contrast=rng.random(1500)))
    assert "the brightness alone gives away c3: 0.9" in issue.detail
    assert issue.files == ()
    assert issue.score <= issue.threshold
    formats = np.where(labels == 7, "PNG", "JPEG")
    (issue,) = look("spurious_correlation", known(labels, format=formats))
    assert "the file format alone gives away c7: 1.00 [0.9" in issue.detail


def test_properties_that_tell_little_or_tell_by_chance_are_not_reported() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 4000)
    # Two thirds of the pictures can be told by their brightness: so much is usual.
    assert look("spurious_correlation", known(labels, brightness=rng.normal(0.5 + 0.1 * labels, 0.11))) == []
    for seed in range(100):
        drawn = np.random.default_rng(seed)
        few = np.repeat([0, 1, 2], 20)
        columns: dict[str, Any] = {name: drawn.random(60) for name in ("brightness", "contrast", "sharpness", "bytes")}
        assert look("spurious_correlation", known(few, **columns)) == [], seed


def test_copies_of_a_few_pictures_are_no_evidence_of_a_correlation() -> None:
    labels, brightness = np.repeat([0, 1], 60), np.repeat([0.1, 0.4, 0.6, 0.9, 0.2, 0.3, 0.7, 0.8], 15)
    (issue,) = look("spurious_correlation", known(labels, brightness=brightness))
    assert "gives away c0, c1: 1.00" in issue.detail
    copies = [f"{row // 15:032x}" for row in range(120)]
    assert look("spurious_correlation", known(labels, brightness=brightness, picture=copies)) == []
