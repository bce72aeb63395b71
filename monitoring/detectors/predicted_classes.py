"""Predicted classes, or whatever the task reads from answers: what is asked for has changed, or what it is taken for.

Statistic: Jensen-Shannon distance (Evidently's `jensenshannon`); effect: total variation distance, the share of predictions
that went to another class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from monitoring import calibration
from monitoring.verdicts import Sample, Shift, ShiftStatus


class Detector(BaseModel):
    """Alarms when a material share of the predictions went to other classes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    material: float = Field(default=0.2, gt=0, le=1)
    """Share of predictions in another class that matters; less than half of it never alarms."""

    @property
    def draws(self) -> int:
        return calibration.ROUNDS

    @property
    def columns(self) -> Mapping[str, str]:
        return {"predicted": "jensenshannon"}

    def detect(self, reference: Sample, window: Sample, measured: Mapping[str, float], *, alpha: float, seed: int) -> Shift:
        """Raises KeyError for a column that was not measured."""
        value = float(measured["predicted"])
        names = categories(reference, window)
        before, after = (_shares(sample.columns["predicted"], names) for sample in (reference, window))
        null = calibration.null_jensen_shannon(before, len(reference), len(window), seed=seed)
        threshold = calibration.exceeded(null, alpha)
        effect = float(np.abs(before - after).sum() / 2)
        trivial = calibration.trivial(self.material)
        smallest = calibration.smallest_class_shift(before, len(reference), len(window), threshold, trivial, seed=seed)
        grown = int(np.argmax(after - before))
        told = f"{names[grown]!r} went from {before[grown]:.1%} to {after[grown]:.1%}"
        status: ShiftStatus
        if value > threshold and effect >= trivial:
            status, message = "drift", f"{effect:.1%} of the predictions went to other classes; {told}"
        elif smallest > self.material:
            status = "inconclusive"
            message = calibration.undecided(
                f"{smallest:.1%} of the predictions",
                f"{self.material:.0%}",
                smallest,
                self.material,
                len(reference),
                len(window),
            )
        else:
            status, message = "pass", f"{effect:.1%} of the predictions in other classes; {told}"
        return Shift(
            detector="predicted_classes",
            status=status,
            message=message,
            statistic="jensenshannon",
            value=value,
            threshold=threshold,
            p_value=calibration.p_value(null, value),
            effect=effect,
            effect_unit="share of predictions",
            material_effect=self.material,
            smallest_shown=smallest,
            n=len(window),
        )


def categories(reference: Sample, window: Sample) -> tuple[str, ...]:
    """The release's classes, and what else is predicted in either sample."""
    seen = {*reference.columns["predicted"].tolist(), *window.columns["predicted"].tolist()}
    return (*window.classes, *sorted(seen - set(window.classes)))


def _shares(predicted: npt.NDArray[Any], names: tuple[str, ...]) -> npt.NDArray[np.float64]:
    place = {name: index for index, name in enumerate(names)}
    counts = np.bincount([place[name] for name in predicted.tolist()], minlength=len(names))
    shares: npt.NDArray[np.float64] = counts / len(predicted)
    return shares
