"""Losses against torch's own functions and against the formula of their paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from components import plugins

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


def test_class_weights_are_inverse_frequencies_and_finite_where_a_class_has_no_image() -> None:
    weights = torch.tensor([40 / 90, 40 / 30, 1.0])
    for smoothing in (0.0, 0.1):
        expected = functional.cross_entropy(LOGITS, LABELS, weight=weights)
        if not smoothing:
            assert value("class_weighted") == pytest.approx(float(expected))
        shares = functional.one_hot(LABELS, 3).float()
        assert value("class_weighted", smoothing=smoothing) == pytest.approx(
            value("class_weighted", shares, smoothing=smoothing)
        )
    assert value("class_weighted", exponent=0.0) == pytest.approx(value("cross_entropy"))
