"""Single-label classification: one linear head, cross-entropy, and metrics that carry their uncertainty.

Intervals are 95 %: Wilson (1927) for shares, Jeffreys posteriors for mean class accuracy and F1, a seeded bootstrap over
images (Efron 1979) for log-loss and ECE. A bootstrapped ECE leans upwards, as ECE itself does on few images.
ECE with 15 equal-width bins and temperature scaling follow Guo et al., "On Calibration of Modern Neural Networks" (2017).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from components.contracts.errors import DataError
from components.contracts.families import OutputField, Reading
from components.contracts.verdicts import ClassMetrics, Estimate
from components.intervals import RESAMPLES, SEED, Floats, Labels, bootstrap, interval, resamples, wilson

if TYPE_CHECKING:
    import torch

_BINS = 15


class Task(BaseModel):
    """One label an image: the likeliest class."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    head_dropout: float = Field(default=0.0, ge=0, lt=1)

    @property
    def headline(self) -> str:
        return "accuracy"

    @property
    def figures(self) -> tuple[Literal["confusion", "reliability"], ...]:
        return ("confusion", "reliability")

    def classes(self, labels: Sequence[str]) -> tuple[str, ...]:
        """Every label is a class."""
        return tuple(sorted(set(labels)))

    def stratum(self, label: str) -> str:
        return label

    def targets(self, labels: Sequence[str], classes: Sequence[str]) -> Labels:
        """The position of each label in `classes`, int64 (n,); raises DataError for another label."""
        place = {name: position for position, name in enumerate(classes)}
        unknown = sorted(set(labels) - set(place))
        if unknown:
            raise DataError(f"{unknown[0]!r} is no class of {', '.join(classes)}")
        return np.array([place[label] for label in labels], dtype=np.int64)

    def head(self, embedding_dim: int, num_classes: int) -> torch.nn.Module:
        """Embeddings (n, embedding_dim) to logits (n, num_classes)."""
        from torch import nn

        return nn.Sequential(nn.Dropout(self.head_dropout), nn.Linear(embedding_dim, num_classes))

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the batch, with the configured label smoothing."""
        from torch.nn import functional

        return functional.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def probabilities(self, logits: npt.NDArray[Any], temperature: float) -> Floats:
        """Softmax of `logits / temperature`, float64 (n, classes)."""
        scaled = logits.astype(np.float64) / temperature
        exponent = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        probabilities: Floats = exponent / exponent.sum(axis=1, keepdims=True)
        return probabilities

    def width(self, classes: Sequence[str]) -> int:
        return len(classes)

    def read(self, probabilities: npt.NDArray[Any], classes: Sequence[str]) -> list[Reading]:
        """The likeliest class of each row, with its probability for the confidence."""
        best = probabilities.argmax(axis=1)
        return [Reading(classes[place], float(row[place])) for row, place in zip(probabilities, best, strict=True)]

    def outputs(self, classes: Sequence[str]) -> tuple[OutputField, ...]:
        return (OutputField("probabilities", "FP32", (len(classes),), lambda probabilities: probabilities),)

    def drift_columns(self, probabilities: npt.NDArray[Any], classes: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        best = probabilities.argmax(axis=1) if len(probabilities) else np.zeros(0, dtype=np.int64)
        return {
            "confidence": probabilities.max(axis=1, initial=0.0).astype(np.float64),
            "predicted": np.array(classes, dtype=np.str_)[best],
        }

    @property
    def one_class(self) -> bool:
        """Losses by name, mixing and balanced sampling take the number of the one class of an image."""
        return True

    def right(self, logits: npt.NDArray[Any], targets: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = logits.argmax(axis=1) == targets
        return found

    def agree(self, logits: npt.NDArray[Any], others: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Equal top-1."""
        found: npt.NDArray[np.bool_] = logits.argmax(axis=1) == others.argmax(axis=1)
        return found

    def concerns(self, labels: Sequence[str], classes: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Images of these classes."""
        known = set(classes)
        return np.array([label in known for label in labels], dtype=np.bool_)

    def select(self, logits: npt.NDArray[Any], classes: Sequence[str], chosen: Sequence[str]) -> npt.NDArray[Any]:
        """The columns of the chosen classes."""
        return logits[:, [list(classes).index(name) for name in chosen]]

    def fit_temperature(self, logits: npt.NDArray[Any], targets: npt.NDArray[Any]) -> float:
        """The temperature in [0.05, 20] that minimises the log-loss of these (valid) logits.

        Targets are Platt's (1999): 1 / (n + 2) of the mass goes to the other classes. Without it, a valid split that is
        answered perfectly would ask for certainty, and the first mistake in production would be an infinite surprise.
        """
        from scipy.optimize import minimize_scalar

        n, num_classes = logits.shape
        doubt = 1.0 / (n + 2)
        wanted = np.full((n, num_classes), doubt / (num_classes - 1))
        wanted[np.arange(n), targets] = 1.0 - doubt

        def log_loss(log_temperature: float) -> float:
            probabilities = self.probabilities(logits, math.exp(log_temperature))
            return float(-(wanted * np.log(np.clip(probabilities, 1e-300, None))).sum(axis=1).mean())

        found = minimize_scalar(log_loss, bounds=(math.log(0.05), math.log(20.0)), method="bounded")
        return float(math.exp(found.x))

    def metrics(self, logits: npt.NDArray[Any], targets: npt.NDArray[Any], temperature: float) -> dict[str, Estimate]:
        """accuracy, mean_class_accuracy, log_loss and ece, each with interval and n; raises ValueError on no images."""
        if len(targets) == 0:
            raise ValueError("no images: there is nothing to measure")
        probabilities = self.probabilities(logits, temperature)
        correct = (logits.argmax(axis=1) == targets).astype(np.float64)
        loss = -np.log(np.clip(probabilities[np.arange(len(targets)), targets], 1e-300, None))
        confidence = probabilities.max(axis=1)
        picks = resamples(len(targets))
        return {
            "accuracy": wilson(int(correct.sum()), len(targets)),
            "mean_class_accuracy": _stratified_mean(correct, targets),
            "log_loss": bootstrap(float(loss.mean()), loss[picks].mean(axis=1), len(targets)),
            "ece": bootstrap(
                expected_calibration_error(confidence, correct),
                np.array([expected_calibration_error(confidence[pick], correct[pick]) for pick in picks]),
                len(targets),
            ),
        }

    def per_class(
        self, logits: npt.NDArray[Any], targets: npt.NDArray[Any], classes: tuple[str, ...]
    ) -> tuple[ClassMetrics, ...]:
        """Precision, recall and F1 of every class that has images."""
        matrix = _counts(logits, targets, len(classes))
        found = []
        for index, name in enumerate(classes):
            hits, support, claimed = int(matrix[index, index]), int(matrix[index].sum()), int(matrix[:, index].sum())
            if support == 0:
                continue
            f1 = _f1(hits, missed=support - hits, wrong=claimed - hits)
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

    def confusion(
        self, logits: npt.NDArray[Any], targets: npt.NDArray[Any], num_classes: int
    ) -> tuple[tuple[int, ...], ...]:
        """Counts (true class, predicted class)."""
        return tuple(tuple(int(count) for count in row) for row in _counts(logits, targets, num_classes))

    def reliability(
        self, logits: npt.NDArray[Any], targets: npt.NDArray[Any], temperature: float
    ) -> tuple[tuple[float, float, int], ...]:
        """(mean confidence, accuracy, count) of each non-empty confidence bin."""
        confidence = self.probabilities(logits, temperature).max(axis=1)
        correct = self.right(logits, targets)
        bins = _bin(confidence)
        return tuple(
            (float(confidence[bins == b].mean()), float(correct[bins == b].mean()), int((bins == b).sum()))
            for b in np.unique(bins)
        )


def _counts(logits: npt.NDArray[Any], targets: npt.NDArray[Any], num_classes: int) -> Labels:
    """Counts (true class, predicted class)."""
    matrix: Labels = np.bincount(targets * num_classes + logits.argmax(axis=1), minlength=num_classes**2)
    return matrix.reshape(num_classes, num_classes)


def expected_calibration_error(confidence: Floats, correct: Floats) -> float:
    """Mean |accuracy - confidence| over 15 equal-width confidence bins, weighted by their counts."""
    bins = _bin(confidence)
    gap = np.bincount(bins, weights=correct - confidence, minlength=_BINS)
    return float(np.abs(gap).sum() / len(confidence))


def _bin(confidence: Floats) -> Labels:
    bins: Labels = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
    return bins


def _stratified_mean(correct: Floats, labels: Labels) -> Estimate:
    """Mean of the classes' recalls; its interval from their Jeffreys posteriors, which stay wide where nothing was wrong."""
    rng = np.random.default_rng(SEED)
    groups = [correct[labels == label] for label in np.unique(labels)]
    value = float(np.mean([group.mean() for group in groups]))
    sampled = np.mean([rng.beta(group.sum() + 0.5, len(group) - group.sum() + 0.5, RESAMPLES) for group in groups], axis=0)
    return interval(value, sampled, len(labels), "jeffreys")


def _f1(hits: int, *, missed: int, wrong: int) -> Estimate:
    """F1 of one class; its interval from the Jeffreys posterior over (hits, missed, wrong). n is the class's support."""
    rng = np.random.default_rng(SEED)
    shares = rng.dirichlet([hits + 0.5, missed + 0.5, wrong + 0.5], RESAMPLES)
    sampled = 2 * shares[:, 0] / (2 * shares[:, 0] + shares[:, 1] + shares[:, 2])
    return interval(2 * hits / (2 * hits + missed + wrong), sampled, hits + missed, "jeffreys")
