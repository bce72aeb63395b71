"""Several labels a picture: a class folder is named by all of them, joined by "+"; an answer is right when all are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from components.contracts.errors import DataError
from components.contracts.families import OutputField, Reading
from components.contracts.verdicts import ClassMetrics, Estimate
from components.intervals import wilson

if TYPE_CHECKING:
    import torch


class Task(BaseModel):
    """Each label by itself, present from a probability of one half on; the likeliest one always."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def headline(self) -> str:
        return "exact_match"

    @property
    def figures(self) -> tuple[Literal["confusion", "reliability"], ...]:
        return ()

    def classes(self, labels: Sequence[str]) -> tuple[str, ...]:
        return tuple(sorted({part for label in labels for part in label.split("+")}))

    def stratum(self, label: str) -> str:
        return label

    def targets(self, labels: Sequence[str], classes: Sequence[str]) -> npt.NDArray[np.float32]:
        """Ones for the labels that are there, float32 (n, classes)."""
        unknown = set(self.classes(labels)) - set(classes)
        if unknown:
            raise DataError(f"{min(unknown)!r} is no class of {', '.join(classes)}")
        return np.array([[name in label.split("+") for name in classes] for label in labels], dtype=np.float32).reshape(
            -1, len(classes)
        )

    def head(self, embedding_dim: int, num_classes: int) -> torch.nn.Module:
        from torch import nn

        return nn.Linear(embedding_dim, num_classes)

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        return functional.binary_cross_entropy_with_logits(logits, targets)

    def fit_temperature(self, logits: npt.NDArray[Any], targets: npt.NDArray[Any]) -> float:
        return 1.0

    def width(self, classes: Sequence[str]) -> int:
        return len(classes)

    def probabilities(self, logits: npt.NDArray[Any], temperature: float) -> npt.NDArray[np.float64]:
        found: npt.NDArray[np.float64] = 1 / (1 + np.exp(-logits.astype(np.float64) / temperature))
        return found

    def read(self, probabilities: npt.NDArray[Any], classes: Sequence[str]) -> list[Reading]:
        """All labels that are present; as sure as of the label that it is least sure of."""
        sure = np.maximum(probabilities, 1 - probabilities).min(axis=1, initial=1.0)
        said = [
            "+".join(name for name, there in zip(classes, row, strict=True) if there) for row in _said(probabilities, 0.5)
        ]
        return [Reading(label, float(confidence)) for label, confidence in zip(said, sure, strict=True)]

    def outputs(self, classes: Sequence[str]) -> tuple[OutputField, ...]:
        shape = (len(classes),)
        return (
            OutputField("probabilities", "FP32", shape, lambda probabilities: probabilities),
            OutputField("present", "BOOL", shape, lambda probabilities: _said(probabilities, 0.5)),
            OutputField("num_labels", "INT64", (), lambda probabilities: _said(probabilities, 0.5).sum(axis=1)),
        )

    def drift_columns(self, probabilities: npt.NDArray[Any], classes: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        readings = self.read(probabilities, classes)
        return {
            "confidence": np.array([reading.confidence for reading in readings], dtype=np.float64),
            "predicted": np.array([reading.label for reading in readings], dtype=np.str_),
            "num_labels": _said(probabilities, 0.5).sum(axis=1),
        }

    def right(self, logits: npt.NDArray[Any], targets: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = (_said(logits, 0) == (targets > 0)).all(axis=1)
        return found

    def agree(self, logits: npt.NDArray[Any], others: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        found: npt.NDArray[np.bool_] = (_said(logits, 0) == _said(others, 0)).all(axis=1)
        return found

    def concerns(self, labels: Sequence[str], classes: Sequence[str]) -> npt.NDArray[np.bool_]:
        return np.array([set(label.split("+")) <= set(classes) for label in labels], dtype=np.bool_)

    def select(self, logits: npt.NDArray[Any], classes: Sequence[str], chosen: Sequence[str]) -> npt.NDArray[Any]:
        return logits[:, [list(classes).index(name) for name in chosen]]

    def metrics(self, logits: npt.NDArray[Any], targets: npt.NDArray[Any], temperature: float) -> dict[str, Estimate]:
        each = _said(logits, 0) == (targets > 0)
        return {
            "exact_match": wilson(int(each.all(axis=1).sum()), len(each)),
            "label_accuracy": wilson(int(each.sum()), each.size),
        }

    def per_class(
        self, logits: npt.NDArray[Any], targets: npt.NDArray[Any], classes: tuple[str, ...]
    ) -> tuple[ClassMetrics, ...]:
        found = []
        for name, said, there in zip(classes, _said(logits, 0).T, (targets > 0).T, strict=True):
            hits, support, claimed = int((said & there).sum()), int(there.sum()), int(said.sum())
            precision = wilson(hits, claimed) if claimed else None
            if support:
                found.append(
                    ClassMetrics(name=name, support=support, precision=precision, recall=wilson(hits, support), f1=None)
                )
        return tuple(found)

    def confusion(
        self, logits: npt.NDArray[Any], targets: npt.NDArray[Any], num_classes: int
    ) -> tuple[tuple[int, ...], ...]:
        return ()

    def reliability(
        self, logits: npt.NDArray[Any], targets: npt.NDArray[Any], temperature: float
    ) -> tuple[tuple[float, float, int], ...]:
        return ()


def _said(values: npt.NDArray[Any], half: float) -> npt.NDArray[np.bool_]:
    """Which labels are present: those above `half`, and the highest of each row."""
    found: npt.NDArray[np.bool_] = (values > half) | (values == values.max(axis=1, keepdims=True, initial=-np.inf))
    return found
