"""A detector: the mean brightness of the pictures has moved.

Look at another way in which production can differ in `detect` instead. Its threshold comes from resampling the reference at
the window's size, so that windows without drift stay quiet, and a window that is too small to show what matters is
inconclusive. `visionloop plugin check` tries it; `loops/MODEL.yaml` names it under `drift.detectors`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from components.images import STATISTICS
from monitoring import calibration
from monitoring.verdicts import Sample, Shift, ShiftStatus

NAME = "template"


class Detector(BaseModel):
    """Alarms when the mean has moved by a material part of its usual spread."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    material: float = Field(default=0.35, gt=0)
    """Displacement that matters, in standard deviations of the reference; less than half of it never alarms."""

    @property
    def draws(self) -> int:
        """How many windows without drift are drawn for the threshold."""
        return calibration.ROUNDS

    @property
    def columns(self) -> Mapping[str, str]:
        """Nothing that Evidently would have to measure."""
        return {}

    def detect(self, reference: Sample, window: Sample, measured: Mapping[str, float], *, alpha: float, seed: int) -> Shift:
        """Pass, drift or inconclusive, and why; at most a share `alpha` of the windows without drift is called drift."""
        ours, theirs = (sample.statistics[:, STATISTICS.index("brightness")] for sample in (reference, window))
        spread = max(float(ours.std()), 0.001)
        value = abs(float(theirs.mean() - ours.mean())) / spread
        rng = np.random.default_rng(seed)
        m, n = len(ours), len(theirs)
        null = np.abs(
            calibration.resampled(rng, m, m, self.draws) @ ours / m - calibration.resampled(rng, m, n, self.draws) @ ours / n
        )
        threshold = calibration.exceeded(null / spread, alpha)
        least = max(threshold, calibration.trivial(self.material))
        smallest = calibration.smallest_displacement(least, m, n)
        told = f"mean brightness went from {ours.mean():.3f} to {theirs.mean():.3f}, {value:.2f} standard deviations"
        status: ShiftStatus
        if value > threshold and value >= least:
            status, message = "drift", told
        elif smallest > self.material:
            status, message = "inconclusive", calibration.undecided_displacement(smallest, self.material, m, n)
        else:
            status, message = "pass", told
        return Shift(
            detector=NAME,
            status=status,
            message=message,
            statistic="difference of means",
            value=value,
            threshold=threshold,
            p_value=calibration.p_value(null / spread, value),
            effect=value,
            effect_unit="standard deviations",
            material_effect=self.material,
            smallest_shown=smallest,
            n=n,
        )
