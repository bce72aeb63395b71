"""Brightness, contrast, sharpness and saturation: what tells a dark, blurred, noisy or discoloured picture.

Statistic by column: Wasserstein distance over the reference's standard deviation (Evidently's `wasserstein`). The columns
are judged together: each is divided by its own spread without drift, and the largest quotient has one threshold, resampled
with the columns of an image kept together (Westfall, Young, "Resampling-Based Multiple Testing", 1993).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from components.images import STATISTICS
from monitoring import calibration
from monitoring.verdicts import Sample, Shift, ShiftStatus

_CONSTANT = 1e-6


class Detector(BaseModel):
    """Alarms when the look of the pictures has moved by a material part of its usual spread."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    material: float = Field(default=0.35, gt=0)
    """Displacement that matters, in standard deviations of the reference; less than half of it never alarms."""

    @property
    def draws(self) -> int:
        return calibration.ROUNDS

    @property
    def columns(self) -> Mapping[str, str]:
        return dict.fromkeys(STATISTICS, "wasserstein")

    def detect(self, reference: Sample, window: Sample, measured: Mapping[str, float], *, alpha: float, seed: int) -> Shift:
        """Raises KeyError for a column that was not measured."""
        varying = [i for i in range(len(STATISTICS)) if reference.statistics[:, i].std() > _CONSTANT]
        values = {name: float(measured[name]) for name in STATISTICS}
        # A column that never varies, such as the saturation of grey pictures, has no spread: any value beside it is new.
        frozen = [i for i in range(len(STATISTICS)) if i not in varying]
        for i in frozen:
            span = np.abs(window.statistics[:, i] - reference.statistics[:, i].mean())
            if np.quantile(span, 0.5) > 0.01:
                name = STATISTICS[i]
                return Shift(
                    detector="image_statistics",
                    status="drift",
                    message=f"{name} never varied in the reference and does now (median difference {np.median(span):.3f})",
                    statistic="wasserstein",
                    value=values[name],
                    effect=values[name],
                    effect_unit="standard deviations",
                    material_effect=self.material,
                    n=len(window),
                    details=values,
                )
        names = [STATISTICS[i] for i in varying]
        if not names:
            return Shift(
                detector="image_statistics",
                status="pass",
                message="no statistic varied in the reference, and none does now",
                statistic="wasserstein",
                n=len(window),
                details=values,
            )
        null = calibration.null_wasserstein(reference.statistics[:, varying], len(window), seed=seed)
        scale = np.quantile(null, 0.95, axis=0)
        largest = (null / scale).max(axis=1)
        threshold = calibration.exceeded(largest, alpha)
        quotients = {name: values[name] / float(scale[i]) for i, name in enumerate(names)}
        worst = max(quotients, key=lambda name: quotients[name])
        p = calibration.p_value(largest, quotients[worst])
        limits = {name: threshold * float(scale[i]) for i, name in enumerate(names)}
        least = {name: max(limit, calibration.trivial(self.material)) for name, limit in limits.items()}
        material = {name: values[name] for name in names if values[name] > limits[name] and values[name] >= least[name]}
        # Of the columns, the one that shows least: a pass has to hold for each of them.
        smallest = max(calibration.smallest_displacement(limit, len(reference), len(window)) for limit in least.values())
        status: ShiftStatus
        if material:
            status = "drift"
            shown = ", ".join(f"{name} by {value:.2f}" for name, value in sorted(material.items(), key=lambda i: -i[1]))
            message = f"the pictures look different: {shown} standard deviations of the reference"
            worst = max(material, key=lambda name: material[name])
        elif smallest > self.material:
            status = "inconclusive"
            message = calibration.undecided_displacement(smallest, self.material, len(reference), len(window))
        else:
            status = "pass"
            message = f"the largest displacement is {values[worst]:.2f} standard deviations ({worst})"
        return Shift(
            detector="image_statistics",
            status=status,
            message=message,
            statistic="wasserstein",
            value=values[worst],
            threshold=limits[worst],
            p_value=p,
            effect=values[worst],
            effect_unit="standard deviations",
            material_effect=self.material,
            smallest_shown=smallest,
            n=len(window),
            details=values,
        )
