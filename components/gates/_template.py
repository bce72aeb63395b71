"""A gate: the mean of the classes' recalls has to lie at or above a floor, with all of its 95 % interval.

Judge by what you care for in `judge` instead. A gate is closed by default: what is missing, empty, not finite or too little
is never a pass, and `compare` and `compare_interval` decide like that. `visionloop plugin check` tries it; a recipe names it
under `gating.gates`.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import Evidence
from components.contracts.verdicts import Finding, compare_interval

NAME = "template"


class Gate(BaseModel):
    """Inconclusive when the interval straddles the floor, and when nothing was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    floor: float = Field(default=0.9, gt=0, lt=1)
    """Smallest mean of the classes' recalls."""

    def judge(self, evidence: Evidence) -> Finding:
        """Pass, fail or inconclusive, and why."""
        estimate = evidence.evaluation.metrics.get("mean_class_accuracy")
        status = compare_interval(estimate, self.floor)
        if estimate is None:
            return Finding(gate=NAME, status=status, message="no mean class accuracy was measured", threshold=self.floor)
        return Finding(
            gate=NAME,
            status=status,
            message=f"mean class accuracy {estimate}, floor {self.floor:g}",
            value=estimate.value,
            threshold=self.floor,
            n=estimate.n,
        )
