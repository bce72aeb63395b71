"""Pictures that are so bright that almost all of them is white, for themselves or beside the others of the data set."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import Known
from components.contracts.issues import Issue, Need
from components.findings._unusual import threshold

NAME = "bright"


class Finding(BaseModel):
    """The score is 1 less the luminance that all but the darkest 5 % of the pixels lie over."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    always: float = Field(default=0.004, ge=0, le=1)
    """Score at and under which a picture is an issue in any data set: less than one grey level of 255."""
    unusual: float = Field(default=0.1, ge=0, le=1)
    """The same where the others are darker: objects on white have no issues."""

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing but the facts."""
        return frozenset()

    def look(self, known: Known) -> list[Issue]:
        """Every such picture, the brightest first."""
        table = known.table.assign(score=1 - known.table["darkest"])
        limit = threshold(table["score"].to_numpy(float), always=self.always, at_most=self.unusual, least_spread=0.03)
        found = table[table["score"] <= limit].sort_values(["score", "sha256", "label"])
        return [
            known.issue(
                NAME,
                [row["path"]],
                severity="warning",
                score=row["score"],
                threshold=limit,
                detail=f"95 % of its pixels are brighter than {row['darkest']:.0%} of white",
                action="look whether it shows what it is labelled as; remove it, or take it anew with less light",
            )
            for row in found.to_dict("records")
        ]
