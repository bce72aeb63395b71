"""A finding: pictures that are much longer than wide, or the other way round.

Look at the facts, the pairs, the embeddings or the probabilities in `look` instead, and say in `needs` which it takes.
`visionloop plugin check` tries it; a recipe names it under `validation.findings`.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import Known
from components.contracts.issues import Issue, Need

NAME = "template"


class Finding(BaseModel):
    """The score is the short side over the long one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float = Field(default=0.2, gt=0, lt=1)
    """Short side over long side, at which and under which a picture is an issue."""

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing but the facts."""
        return frozenset()

    def look(self, known: Known) -> list[Issue]:
        """Every picture of such a shape, the most extreme first."""
        shape = known.table["short_side"] / known.table[["width", "height"]].max(axis=1)
        found = known.table.assign(shape=shape)[shape <= self.threshold].sort_values(["shape", "sha256", "label"])
        return [
            known.issue(
                NAME,
                [row["path"]],
                severity="warning",
                score=row["shape"],
                threshold=self.threshold,
                detail=f"{row['width']}x{row['height']} pixels",
                action="cut it to the part that shows what it is about, or remove it",
            )
            for row in found.to_dict("records")
        ]
