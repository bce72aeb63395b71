"""Floor of the task's headline metric, which is accuracy for classes: the whole 95 % interval has to lie at or above it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import Evidence, Least
from components.contracts.verdicts import Finding, compare_interval, enough, fewest, too_few
from components.intervals import wilson


class Gate(BaseModel):
    """Inconclusive when the interval straddles the floor: the test images do not decide, more are needed."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    floor: float = Field(gt=0, lt=1)

    def judge(self, evidence: Evidence) -> Finding:
        name = evidence.headline
        estimate = evidence.evaluation.metrics.get(name)
        status = compare_interval(estimate, self.floor)
        if estimate is None:
            why = f": {evidence.evaluation.reason}" if evidence.evaluation.reason else ""
            return Finding(gate="accuracy", status=status, message=f"no {name} was measured{why}", threshold=self.floor)
        if status == "inconclusive":
            meaning = too_few("test images", estimate.n, enough(lambda n: self._decides(estimate.value, n), estimate.n))
        else:
            meaning = "all of the 95 % interval is " + {"pass": "at or above it", "fail": "below it"}[status]
        return Finding(
            gate="accuracy",
            status=status,
            message=f"{name} {estimate}, floor {self.floor:g}: {meaning}",
            value=estimate.value,
            threshold=self.floor,
            n=estimate.n,
        )

    def least(self) -> Least:
        return Least(images=fewest(lambda n: wilson(n, n).low >= self.floor))

    def _decides(self, share: float, n: int) -> bool:
        """Whether the floor would be decided if `n` images gave the same share of right answers."""
        return compare_interval(wilson(round(share * n), n), self.floor) != "inconclusive"
