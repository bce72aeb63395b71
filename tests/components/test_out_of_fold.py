from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from components import out_of_fold
from components.contracts.errors import DataError
from components.out_of_fold import folds_of, probabilities

Floats = npt.NDArray[np.float32]


def overlapping(n: int, seed: int = 0) -> tuple[Floats, list[str], list[str]]:
    """Embeddings of three classes that overlap, their labels and the pictures' names."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 3, n)
    centres = rng.normal(size=(3, 16)) * 0.7
    embeddings = (centres[classes] + rng.normal(size=(n, 16))).astype(np.float32)
    return embeddings, [f"c{number}" for number in classes], [f"{seed}-{row:05d}" for row in range(n)]


def right(found: Floats, labels: list[str], classes: list[str]) -> npt.NDArray[np.bool_]:
    answers: npt.NDArray[np.bool_] = np.array([classes[column] for column in found.argmax(axis=1)]) == np.array(labels)
    return answers


def test_nothing_is_answered_by_a_head_that_saw_it_or_its_twin() -> None:
    """Labels are drawn at random, and every picture is there twice: only who saw its twin can know its label."""
    rng = np.random.default_rng(0)
    embeddings = np.repeat(rng.normal(size=(120, 400)).astype(np.float32), 2, axis=0)
    labels = [f"c{number}" for number in np.repeat(rng.integers(0, 2, 120), 2)]
    twins, alone = [str(row // 2) for row in range(240)], [str(row) for row in range(240)]
    classes = ["c0", "c1"]
    assert right(probabilities(embeddings, labels, classes, alone), labels, classes).mean() > 0.8
    assert right(probabilities(embeddings, labels, classes, twins), labels, classes).mean() < 0.62
    folds = folds_of(twins, labels)
    assert (folds[::2] == folds[1::2]).all()


def test_folds_are_even_in_every_class_and_the_same_in_any_order() -> None:
    embeddings, labels, names = overlapping(300)
    folds = folds_of(names, labels)
    for label in set(labels):
        of_class = np.bincount(folds[np.array(labels) == label], minlength=5)
        assert of_class.max() - of_class.min() <= 1
    order = np.random.default_rng(1).permutation(300)
    mixed = folds_of([names[row] for row in order], [labels[row] for row in order])
    assert (mixed == folds[order]).all()
    found = probabilities(embeddings, labels, ["c0", "c1", "c2"], names)
    again = probabilities(
        embeddings[order], [labels[row] for row in order], ["c0", "c1", "c2"], [names[row] for row in order]
    )
    np.testing.assert_allclose(again, found[order], atol=1e-4)


def test_probabilities_mean_what_they_say() -> None:
    embeddings, labels, names = overlapping(3000)
    classes = ["c0", "c1", "c2"]
    found = probabilities(embeddings, labels, classes, names)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    is_right, confidence = right(found, labels, classes), found.max(axis=1)
    assert is_right.mean() > 0.8
    assert confidence.std() > 0.1
    for low, high in ((0.0, 0.75), (0.75, 0.95), (0.95, 1.1)):
        some = (confidence >= low) & (confidence < high)
        assert abs(is_right[some].mean() - confidence[some].mean()) < 0.06, (low, some.sum())


def test_where_pictures_are_many_a_class_between_two_others_is_known_in_spite_of_wrong_labels() -> None:
    """A regression on the classes can hardly tell what lies between two others on one line."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, 2000)
    embeddings = rng.normal(size=(2000, 4)).astype(np.float32)
    embeddings[:, 0] += 4.0 * classes.astype(np.float32) - 4.0
    truth = [f"c{number}" for number in classes]
    labels = [f"c{number}" for number in np.where(rng.random(2000) < 0.1, (classes + 1) % 3, classes)]
    found = probabilities(embeddings, labels, ["c0", "c1", "c2"], [f"{row:05d}" for row in range(2000)])
    assert right(found, truth, ["c0", "c1", "c2"]).mean() > 0.87
    assert found[np.array(labels) != np.array(truth)].max(axis=1).mean() > 0.87


def test_a_class_that_no_head_could_know_is_not_doubted() -> None:
    """All pictures of c2 are copies of each other, so that they are in one fold."""
    embeddings, labels, names = overlapping(300)
    clusters = ["copies" if label == "c2" else name for name, label in zip(names, labels, strict=True)]
    found = probabilities(embeddings, labels, ["c0", "c1", "c2"], clusters)
    copies = np.array(labels) == "c2"
    assert (found[copies] == [0, 0, 1]).all()
    assert not (found[~copies].max(axis=1) == 1).any()


def test_what_there_is_nothing_to_learn_from_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = np.zeros((4, 3), dtype=np.float32)
    with pytest.raises(DataError, match="no pictures of two classes"):
        probabilities(embeddings, ["a"] * 4, ["a"], list("wxyz"))
    with pytest.raises(DataError, match="no pictures of two classes"):
        probabilities(embeddings, ["a", "a", "b", "b"], ["a", "b"], ["one"] * 4)
    monkeypatch.setattr(out_of_fold, "MAX_PROBABILITIES", 100)
    many = [f"c{number}" for number in range(26)]
    with pytest.raises(DataError, match="more probabilities than"):
        probabilities(embeddings, many[:4], many, list("wxyz"))
