"""Single-label classification: one linear head, cross-entropy, and metrics that carry their uncertainty.

Intervals are 95 %: Wilson (1927) for shares, a seeded bootstrap over images (Efron 1979) for everything else.
ECE with 15 equal-width bins and temperature scaling follow Guo et al., "On Calibration of Modern Neural Networks" (2017).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from components.contracts import ClassMetrics, Estimate

if TYPE_CHECKING:
    import torch

_Z95 = 1.959963984540054
_BINS = 15
_RESAMPLES = 1000

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


class Task(BaseModel):
    """Head, loss and metrics of single-label classification."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    head_dropout: float = Field(default=0.0, ge=0, lt=1)

    def head(self, embedding_dim: int, num_classes: int) -> torch.nn.Module:
        """Embeddings (n, embedding_dim) to logits (n, num_classes)."""
        from torch import nn

        return nn.Sequential(nn.Dropout(self.head_dropout), nn.Linear(embedding_dim, num_classes))

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the batch, with the configured label smoothing."""
        from torch.nn import functional

        return functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def probabilities(self, logits: npt.NDArray[Any], temperature: float) -> Floats:
        """Softmax of `logits / temperature`, float64 (n, classes)."""
        scaled = logits.astype(np.float64) / temperature
        exponent = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        probabilities: Floats = exponent / exponent.sum(axis=1, keepdims=True)
        return probabilities

    def fit_temperature(self, logits: npt.NDArray[Any], labels: Labels) -> float:
        """The temperature in [0.05, 20] that minimises the log-loss of these (valid) logits.

        Targets are Platt's (1999): 1 / (n + 2) of the mass goes to the other classes. Without it, a valid split that is
        answered perfectly would ask for certainty, and the first mistake in production would be an infinite surprise.
        """
        from scipy.optimize import minimize_scalar

        n, num_classes = logits.shape
        doubt = 1.0 / (n + 2)
        targets = np.full((n, num_classes), doubt / (num_classes - 1))
        targets[np.arange(n), labels] = 1.0 - doubt

        def log_loss(log_temperature: float) -> float:
            probabilities = self.probabilities(logits, math.exp(log_temperature))
            return float(-(targets * np.log(np.clip(probabilities, 1e-300, None))).sum(axis=1).mean())

        found = minimize_scalar(log_loss, bounds=(math.log(0.05), math.log(20.0)), method="bounded")
        return float(math.exp(found.x))

    def metrics(self, logits: npt.NDArray[Any], labels: Labels, temperature: float) -> dict[str, Estimate]:
        """accuracy, mean_class_accuracy, log_loss and ece, each with interval and n; raises ValueError on no images."""
        if len(labels) == 0:
            raise ValueError("no images: there is nothing to measure")
        probabilities = self.probabilities(logits, temperature)
        correct = (logits.argmax(axis=1) == labels).astype(np.float64)
        loss = -np.log(np.clip(probabilities[np.arange(len(labels)), labels], 1e-300, None))
        confidence = probabilities.max(axis=1)
        picks = _resamples(len(labels))
        return {
            "accuracy": wilson(int(correct.sum()), len(labels)),
            "mean_class_accuracy": _stratified_mean(correct, labels),
            "log_loss": _bootstrap(float(loss.mean()), loss[picks].mean(axis=1), len(labels)),
            "ece": _bootstrap(
                expected_calibration_error(confidence, correct),
                np.array([expected_calibration_error(confidence[pick], correct[pick]) for pick in picks]),
                len(labels),
            ),
        }

    def per_class(self, predicted: Labels, labels: Labels, classes: tuple[str, ...]) -> tuple[ClassMetrics, ...]:
        """Precision, recall and F1 of every class that has images."""
        matrix = self.confusion(predicted, labels, len(classes))
        picks = _resamples(len(labels))
        sampled_predicted, sampled_labels = predicted[picks], labels[picks]
        found = []
        for index, name in enumerate(classes):
            hits, support, claimed = int(matrix[index, index]), int(matrix[index].sum()), int(matrix[:, index].sum())
            if support == 0:
                continue
            both = ((sampled_predicted == index) & (sampled_labels == index)).sum(axis=1)
            either = (sampled_predicted == index).sum(axis=1) + (sampled_labels == index).sum(axis=1)
            f1 = _bootstrap(2 * hits / (support + claimed), 2 * both[either > 0] / either[either > 0], len(labels))
            found.append(
                ClassMetrics(
                    name=name,
                    support=support,
                    precision=wilson(hits, claimed) if claimed else None,
                    recall=wilson(hits, support),
                    f1=f1 if claimed else None,
                )
            )
        return tuple(found)

    def confusion(self, predicted: Labels, labels: Labels, num_classes: int) -> npt.NDArray[np.int64]:
        """Counts (true class, predicted class)."""
        matrix: npt.NDArray[np.int64] = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
        return matrix.reshape(num_classes, num_classes)

    def reliability(
        self, logits: npt.NDArray[Any], labels: Labels, temperature: float
    ) -> tuple[tuple[float, float, int], ...]:
        """(mean confidence, accuracy, count) of each non-empty confidence bin."""
        confidence = self.probabilities(logits, temperature).max(axis=1)
        correct = logits.argmax(axis=1) == labels
        bins = _bin(confidence)
        return tuple(
            (float(confidence[bins == b].mean()), float(correct[bins == b].mean()), int((bins == b).sum()))
            for b in np.unique(bins)
        )


def wilson(hits: int, n: int) -> Estimate:
    """Share hits / n with its 95 % Wilson score interval; raises ValueError on n = 0."""
    if n <= 0:
        raise ValueError("a share of no images has no value")
    share, z2 = hits / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # Rounding must not put the value outside its own interval at 0 and 1.
    low, high = min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))
    return Estimate(value=share, low=low, high=high, n=n, method="wilson")


def expected_calibration_error(confidence: Floats, correct: Floats) -> float:
    """Mean |accuracy - confidence| over 15 equal-width confidence bins, weighted by their counts."""
    bins = _bin(confidence)
    gap = np.bincount(bins, weights=correct - confidence, minlength=_BINS)
    return float(np.abs(gap).sum() / len(confidence))


def _bin(confidence: Floats) -> Labels:
    bins: Labels = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    return bins


def _resamples(n: int) -> Labels:
    # A fixed seed: the same answers must give the same interval on every rerun and machine.
    picks: Labels = np.random.default_rng(20240717).integers(0, n, size=(_RESAMPLES, n))
    return picks


def _bootstrap(value: float, resampled: Floats, n: int) -> Estimate:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value), n=n, method="bootstrap")


def _stratified_mean(correct: Floats, labels: Labels) -> Estimate:
    rng = np.random.default_rng(20240717)
    groups = [correct[labels == label] for label in np.unique(labels)]
    value = float(np.mean([group.mean() for group in groups]))
    resampled = np.mean([rng.choice(group, size=(_RESAMPLES, len(group))).mean(axis=1) for group in groups], axis=0)
    return _bootstrap(value, resampled, len(labels))
