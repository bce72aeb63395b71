"""Losses against torch's own functions and against the formula of their paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from components import plugins
from components.losses._weights import class_weights

LOGITS = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3], [-1.0, 3.0, 0.0], [0.0, 0.0, 5.0]])
LABELS = torch.tensor([0, 0, 1, 2])
COUNTS = torch.tensor([30, 10, 0])


def value(name: str, targets: torch.Tensor = LABELS, **settings: Any) -> float:
    return float(plugins.load("losses", name, settings).loss(LOGITS, targets, counts=COUNTS))


def test_cross_entropy_is_torch_s() -> None:
    assert value("cross_entropy") == pytest.approx(float(functional.cross_entropy(LOGITS, LABELS)))
    smooth = functional.cross_entropy(LOGITS, LABELS, label_smoothing=0.1)
    assert value("cross_entropy", smoothing=0.1) == pytest.approx(float(smooth))
    shares = torch.tensor([[0.7, 0.3, 0], [1, 0, 0], [0, 0.5, 0.5], [0, 0, 1]])
    assert value("cross_entropy", shares) == pytest.approx(float(functional.cross_entropy(LOGITS, shares)))


def test_focal_is_its_formula_and_without_gamma_cross_entropy() -> None:
    right = LOGITS.softmax(dim=1)[torch.arange(4), LABELS]
    assert value("focal", gamma=2.0) == pytest.approx(float((-((1 - right) ** 2) * right.log()).mean()))
    assert value("focal", gamma=0.0) == pytest.approx(value("cross_entropy"))
    assert not plugins.load("losses", "focal").takes_shares
    # 1/30 and 1/10, times 40 images by 2 classes; a class without images weighs 1.
    alpha = torch.tensor([2 / 3, 2.0, 1.0])[LABELS]
    weighted = -alpha * (1 - right) ** 2 * right.log()
    assert value("focal", exponent=1.0) == pytest.approx(float(weighted.mean()))
    assert value("focal", gamma=0.0, exponent=0.5) == pytest.approx(value("class_weighted", exponent=0.5))


@pytest.mark.parametrize("gamma", [0.1, 1.0, 2.0])
def test_focal_has_a_finite_gradient_where_an_answer_is_certain(gamma: float) -> None:
    logits = torch.tensor([[1e4, 0.0], [20.0, 0.0], [-1e4, 0.0]], requires_grad=True)
    loss = plugins.load("losses", "focal", {"gamma": gamma})
    loss.loss(logits, torch.zeros(3, dtype=torch.int64), counts=COUNTS).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(
    ("counts", "exponent", "weights"),
    [
        # 1/6, 1/3 and 1, times 10/3 images a class.
        ([6, 3, 1], 1.0, [10 / 18, 10 / 9, 10 / 3]),
        ([6, 3, 1], 0.0, [1.0, 1.0, 1.0]),
        # 1/2 and 1/3, times 13/5.
        ([4, 9], 0.5, [1.3, 13 / 15]),
        # 1/8 and 1/2, times 10/2; a class without an image weighs as the mean image does.
        ([8, 0, 2], 1.0, [0.625, 1.0, 2.5]),
        ([0, 0], 1.0, [1.0, 1.0]),
    ],
)
def test_class_weights_are_inverse_frequencies_and_finite_where_a_class_has_no_image(
    counts: list[int], exponent: float, weights: list[float]
) -> None:
    found = class_weights(torch.tensor(counts), exponent)
    assert found.tolist() == pytest.approx(weights, rel=1e-6)


def test_class_weighted_is_the_weighted_mean_over_images_of_numbers_and_of_shares() -> None:
    # 1/30 and 1/10, times 40 images by 2 classes.
    weights = torch.tensor([40 / 60, 40 / 20, 1.0])
    for smoothing in (0.0, 0.1):
        summed = functional.cross_entropy(LOGITS, LABELS, weight=weights, label_smoothing=smoothing, reduction="sum")
        shares = functional.one_hot(LABELS, 3).float()
        assert value("class_weighted", smoothing=smoothing) == pytest.approx(float(summed) / 4)
        assert value("class_weighted", shares, smoothing=smoothing) == pytest.approx(float(summed) / 4)
    assert value("class_weighted", exponent=0.0) == pytest.approx(value("cross_entropy"))


def test_parts_of_a_batch_add_up_to_the_whole_in_every_loss() -> None:
    """A batch that does not fit is taken in parts, each by its number of images."""
    for name in plugins.shipped("losses"):
        loss = plugins.load("losses", name)
        parts = [loss.loss(LOGITS[at], LABELS[at], counts=COUNTS) * len(LABELS[at]) / 4 for at in (slice(1), slice(1, 4))]
        assert value(name) == pytest.approx(float(sum(parts)), rel=1e-6), name
