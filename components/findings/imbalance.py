"""Classes with far fewer pictures than the others: a model learns to answer them seldom, and a test says little of them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import Known
from components.contracts.issues import Issue, Need
from components.contracts.wording import counted

NAME = "imbalance"


class Finding(BaseModel):
    """The score is a class's share of the pictures over that of classes that are all of one size, at most 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float = Field(default=0.1, ge=0, le=1)
    """Score under which a class is an issue."""

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing but the facts."""
        return frozenset()

    def look(self, known: Known) -> list[Issue]:
        """One issue for each such class, the smallest first."""
        counts = known.table["label"].value_counts()
        even = len(known.table) / max(1, len(counts))
        found = sorted((int(count), str(label)) for label, count in counts.items() if count < self.threshold * even)
        return [
            known.issue(
                NAME,
                [],
                severity="warning",
                score=count / even,
                threshold=self.threshold,
                detail=f"class {label!r} has {counted(count, 'picture')}; classes of one size would have {even:.0f}",
                action="add pictures of it, or let training weigh them more (loss class_weighted, or sampling balanced)",
                about=label,
            )
            for count, label in found
        ]
