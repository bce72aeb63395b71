from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, precision_recall_fscore_support

from components.intervals import wilson
from components.tasks.classification import Task, expected_calibration_error

RNG = np.random.default_rng(11)
LABELS = RNG.integers(0, 4, 500)
LOGITS = np.eye(4)[LABELS] * 2 + RNG.normal(0, 1.2, (500, 4))
TASK = Task()
CLASSES = ("a", "b", "c", "d")


def test_metrics_agree_with_scikit_learn() -> None:
    found = TASK.metrics(LOGITS, LABELS, 1.0)
    predicted = LOGITS.argmax(axis=1)
    assert found["accuracy"].value == pytest.approx(accuracy_score(LABELS, predicted))
    assert found["log_loss"].value == pytest.approx(log_loss(LABELS, TASK.probabilities(LOGITS, 1.0)))
    precision, recall, f1, support = precision_recall_fscore_support(LABELS, predicted)
    for index, metrics in enumerate(TASK.per_class(LOGITS, LABELS, CLASSES)):
        assert metrics.precision is not None
        assert metrics.f1 is not None
        assert metrics.precision.value == pytest.approx(precision[index])
        assert metrics.recall.value == pytest.approx(recall[index])
        assert metrics.f1.value == pytest.approx(f1[index])
        assert metrics.support == support[index]
    assert found["mean_class_accuracy"].value == pytest.approx(recall.mean())
    assert np.array_equal(TASK.confusion(LOGITS, LABELS, 4), confusion_matrix(LABELS, predicted))


def test_every_estimate_lies_in_its_interval_and_repeats_exactly() -> None:
    first, second = TASK.metrics(LOGITS, LABELS, 1.3), TASK.metrics(LOGITS, LABELS, 1.3)
    assert first == second
    for estimate in first.values():
        assert estimate.low <= estimate.value <= estimate.high
        assert estimate.n == 500


def test_wilson_is_the_published_interval() -> None:
    # Newcombe (1998), table I: 81 of 263.
    estimate = wilson(81, 263)
    assert estimate.low == pytest.approx(0.2553, abs=5e-4)
    assert estimate.high == pytest.approx(0.3662, abs=5e-4)
    assert wilson(0, 10).low == 0.0
    assert wilson(10, 10).high == 1.0


def test_a_class_that_is_never_predicted_has_no_precision() -> None:
    metrics = TASK.per_class(np.eye(2)[np.zeros(10, dtype=np.int64)], np.arange(10) % 2, ("a", "b"))
    assert metrics[1].precision is None
    assert metrics[1].f1 is None
    assert metrics[1].recall.value == 0


def test_no_images_have_no_metrics() -> None:
    with pytest.raises(ValueError, match="no images"):
        TASK.metrics(LOGITS[:0], LABELS[:0], 1.0)


def test_temperature_repairs_scaled_logits() -> None:
    right = TASK.fit_temperature(LOGITS, LABELS)
    assert TASK.fit_temperature(LOGITS * 5, LABELS) == pytest.approx(right * 5, rel=0.02)
    before = TASK.metrics(LOGITS * 5, LABELS, 1.0)
    after = TASK.metrics(LOGITS * 5, LABELS, right * 5)
    assert after["ece"].value < before["ece"].value / 2
    assert after["accuracy"] == before["accuracy"]


def test_a_perfect_valid_split_does_not_ask_for_certainty() -> None:
    labels = np.arange(130) % 2
    logits = np.eye(2)[labels] * 6.0
    probabilities = TASK.probabilities(logits, TASK.fit_temperature(logits, labels))
    assert 0.98 < probabilities.max(axis=1).mean() < 0.995


def test_ece_of_the_extremes() -> None:
    assert expected_calibration_error(np.full(100, 1.0), np.ones(100)) == pytest.approx(0)
    assert expected_calibration_error(np.full(100, 0.9), np.zeros(100)) == pytest.approx(0.9)


def test_a_perfect_score_on_few_images_is_not_certain() -> None:
    labels = np.arange(40) % 4
    found = TASK.metrics(np.eye(4)[labels] * 9, labels, 1.0)
    assert found["mean_class_accuracy"].value == 1.0
    assert found["mean_class_accuracy"].low < 0.99
    for metrics in TASK.per_class(np.eye(4)[labels], labels, CLASSES):
        assert metrics.f1 is not None
        assert metrics.f1.value == 1.0
        assert metrics.f1.low < 0.95
        assert metrics.f1.n == 10


def test_the_interval_of_mean_class_accuracy_covers_the_truth() -> None:
    rng, covered = np.random.default_rng(3), 0
    labels, truth = np.repeat(np.arange(3), (100, 40, 20)), np.array([0.95, 0.8, 0.7])
    for _ in range(200):
        right = rng.random(160) < truth[labels]
        logits = np.eye(3)[np.where(right, labels, (labels + 1) % 3)] * 4.0
        estimate = TASK.metrics(logits, labels, 1.0)["mean_class_accuracy"]
        covered += estimate.low <= truth.mean() <= estimate.high
    assert covered / 200 > 0.9
