"""Calibrated confidence: a model that meets what it does not know is less sure, before anybody labels anything.

Statistic: Wasserstein distance over the reference's standard deviation (Evidently's `wasserstein`).
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

from monitoring import calibration
from monitoring.verdicts import Sample, Shift, ShiftStatus


class Detector(BaseModel):
    """Alarms when the confidences have moved by a material part of their usual spread."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    material: float = Field(default=0.35, gt=0)
    """Displacement that matters, in standard deviations of the reference; less than half of it never alarms."""

    @property
    def draws(self) -> int:
        return calibration.ROUNDS

    @property
    def columns(self) -> Mapping[str, str]:
        return {"confidence": "wasserstein"}

    def detect(self, reference: Sample, window: Sample, measured: Mapping[str, float], *, alpha: float, seed: int) -> Shift:
        """Raises KeyError for a column that was not measured."""
        value = float(measured["confidence"])
        null = calibration.null_wasserstein(reference.columns["confidence"][:, None], len(window), seed=seed)[:, 0]
        threshold = calibration.exceeded(null, alpha)
        least = max(threshold, calibration.trivial(self.material))
        smallest = calibration.smallest_displacement(least, len(reference), len(window))
        before, after = (float(sample.columns["confidence"].mean()) for sample in (reference, window))
        status: ShiftStatus
        if value > threshold and value >= least:
            status = "drift"
            message = f"mean confidence went from {before:.3f} to {after:.3f}, {value:.2f} standard deviations"
        elif smallest > self.material:
            status = "inconclusive"
            message = calibration.undecided_displacement(smallest, self.material, len(reference), len(window))
        else:
            status = "pass"
            message = f"mean confidence {after:.3f}, in the reference {before:.3f}"
        return Shift(
            detector="confidence",
            status=status,
            message=message,
            statistic="wasserstein",
            value=value,
            threshold=threshold,
            p_value=calibration.p_value(null, value),
            effect=value,
            effect_unit="standard deviations",
            material_effect=self.material,
            smallest_shown=smallest,
            n=len(window),
        )
