"""Pictures that are too dark to show something, for themselves or beside the others of the data set."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import Known
from components.contracts.issues import Issue, Need
from components.findings._unusual import threshold

NAME = "dark"


class Finding(BaseModel):
    """The score is the luminance that all but the brightest 1 % of the pixels lie under."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    always: float = Field(default=0.05, ge=0, le=1)
    """Score at and under which a picture is an issue in any data set."""
    unusual: float = Field(default=0.3, ge=0, le=1)
    """The same where the others are brighter: data that were taken at night have no issues."""

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing but the facts."""
        return frozenset()

    def look(self, known: Known) -> list[Issue]:
        """Every dark picture, the darkest first."""
        table = known.table
        limit = threshold(table["brightest"].to_numpy(float), always=self.always, at_most=self.unusual, least_spread=0.03)
        found = table[table["brightest"] <= limit].sort_values(["brightest", "sha256", "label"])
        return [
            known.issue(
                NAME,
                [row["path"]],
                severity="warning",
                score=row["brightest"],
                threshold=limit,
                detail=f"99 % of its pixels are darker than {row['brightest']:.0%} of white",
                action="look whether it shows what it is labelled as; remove it, or take it anew with more light",
            )
            for row in found.to_dict("records")
        ]
