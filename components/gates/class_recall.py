"""Per-class floor: no class may be sacrificed for the mean. All of each recall's 95 % interval has to lie at or above it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import Evidence, Least
from components.contracts.verdicts import (
    ClassMetrics,
    Estimate,
    Finding,
    compare_interval,
    enough,
    fewest,
    too_few,
)
from components.contracts.wording import counted
from components.intervals import wilson


class Gate(BaseModel):
    """Fails when one class's interval lies below the floor; inconclusive when one straddles it, or has too few images."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    floor: float = Field(gt=0, lt=1)
    min_images: int = Field(default=20, ge=1)

    def judge(self, evidence: Evidence) -> Finding:
        measured = {metrics.name: metrics for metrics in evidence.evaluation.per_class}
        if not measured:
            return self._inconclusive(f"no recall was measured: {evidence.evaluation.reason or 'there are no answers'}")
        supports = {name: measured[name].support if name in measured else 0 for name in evidence.engine.classes}
        scarce = {name: support for name, support in supports.items() if support < max(1, self.min_images)}
        if scarce:
            told = [too_few(f"test images of {name!r}", n, self.min_images, exactly=True) for name, n in scarce.items()]
            return self._inconclusive("; ".join(told), n=min(scarce.values()))
        by_status: dict[str, list[ClassMetrics]] = {"fail": [], "inconclusive": [], "pass": []}
        for metrics in sorted(measured.values(), key=lambda m: (m.recall.value, m.recall.low)):
            by_status[compare_interval(metrics.recall, self.floor)].append(metrics)
        status, decisive = next((status, found) for status, found in by_status.items() if found)
        worst = decisive[0]
        others = f", and {counted(len(decisive) - 1, 'other class')}" if len(decisive) > 1 else ""
        meaning = {
            "fail": f"all of the 95 % interval is below it{others}",
            "inconclusive": self._undecided(worst.name, worst.recall) + others,
            "pass": "all of every class's 95 % interval is at or above it",
        }[status]
        return Finding.model_validate(
            {
                "gate": "class_recall",
                "status": status,
                "message": f"{'worst ' * (status == 'pass')}class {worst.name!r}: recall {worst.recall}, floor "
                f"{self.floor:g}: {meaning}",
                "value": worst.recall.value,
                "threshold": self.floor,
                "n": worst.support,
            }
        )

    def least(self) -> Least:
        needed = fewest(lambda n: wilson(n, n).low >= self.floor)
        return Least(of_each_class=max(self.min_images, needed or 0))

    def _undecided(self, name: str, recall: Estimate) -> str:
        needed = enough(
            lambda n: compare_interval(wilson(round(recall.value * n), n), self.floor) != "inconclusive", recall.n
        )
        return too_few(f"test images of {name!r}", recall.n, needed)

    def _inconclusive(self, message: str, *, n: int | None = None) -> Finding:
        return Finding(gate="class_recall", status="inconclusive", message=message, threshold=self.floor, n=n)
