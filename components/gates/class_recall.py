"""Per-class floor: no class may be sacrificed for the mean."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import Evidence, Least
from components.contracts.verdicts import Finding, compare, too_few


class Gate(BaseModel):
    """The recall of the worst class; inconclusive when any class has fewer than `min_images` test images."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    floor: float = Field(gt=0, lt=1)
    min_images: int = Field(default=20, ge=1)

    def judge(self, evidence: Evidence) -> Finding:
        measured = {metrics.name: metrics for metrics in evidence.evaluation.per_class}
        if not measured:
            return self._inconclusive(f"no recall was measured: {evidence.evaluation.reason or 'there are no answers'}")
        supports = {name: measured[name].support if name in measured else 0 for name in evidence.engine.classes}
        scarce = [
            too_few(f"test images of {name!r}", support, self.min_images, exactly=True)
            for name, support in supports.items()
            if support < max(1, self.min_images)
        ]
        if scarce:
            return self._inconclusive("; ".join(scarce))
        worst = min(measured.values(), key=lambda m: m.recall.value)
        status = compare(worst.recall.value, self.floor, at_least=True)
        return Finding(
            gate="class_recall",
            status=status,
            message=f"worst class {worst.name!r}: recall {worst.recall}, floor {self.floor:g}",
            value=worst.recall.value,
            threshold=self.floor,
            n=worst.support,
        )

    def least(self) -> Least:
        return Least(of_each_class=self.min_images)

    def _inconclusive(self, message: str) -> Finding:
        return Finding(gate="class_recall", status="inconclusive", message=message, threshold=self.floor)
