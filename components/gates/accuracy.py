"""Accuracy floor: the whole 95 % interval has to lie at or above it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from components.contracts import Evidence, Finding, compare_interval


class Gate(BaseModel):
    """Inconclusive when the interval straddles the floor: the test images do not decide, more are needed."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    floor: float = Field(gt=0, lt=1)

    def judge(self, evidence: Evidence) -> Finding:
        estimate = evidence.evaluation.metrics.get("accuracy")
        status = compare_interval(estimate, self.floor)
        if estimate is None:
            return Finding(gate="accuracy", status=status, message="no accuracy was measured", threshold=self.floor)
        place = {"pass": "at or above", "fail": "below", "inconclusive": "on both sides of"}[status]
        return Finding(
            gate="accuracy",
            status=status,
            message=f"accuracy {estimate}: its 95 % interval lies {place} the floor {self.floor}",
            value=estimate.value,
            threshold=self.floor,
            n=estimate.n,
        )
