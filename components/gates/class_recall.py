"""Per-class floor: no class may be sacrificed for the mean."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from components.contracts import Evidence, Finding, compare


class Gate(BaseModel):
    """The recall of the worst class; inconclusive when any class has fewer than `min_images` test images."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    floor: float = Field(gt=0, lt=1)
    min_images: int = Field(default=20, ge=1)

    def judge(self, evidence: Evidence) -> Finding:
        measured = {metrics.name: metrics for metrics in evidence.evaluation.per_class}
        missing = [name for name in evidence.engine.classes if name not in measured]
        if not measured or missing:
            shown = ", ".join(missing) or "every class"
            return _finding("inconclusive", f"no test images of {shown}", self.floor)
        scarce = [m.name for m in measured.values() if m.support < self.min_images]
        if scarce:
            return _finding(
                "inconclusive", f"fewer than {self.min_images} test images of {', '.join(scarce)}: add some", self.floor
            )
        worst = min(measured.values(), key=lambda m: m.recall.value)
        status = compare(worst.recall.value, self.floor, at_least=True)
        return Finding(
            gate="class_recall",
            status=status,
            message=f"worst class {worst.name!r}: recall {worst.recall}, floor {self.floor}",
            value=worst.recall.value,
            threshold=self.floor,
            n=worst.support,
        )


def _finding(status: str, message: str, floor: float) -> Finding:
    assert status == "inconclusive"
    return Finding(gate="class_recall", status="inconclusive", message=message, threshold=floor)
