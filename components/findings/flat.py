"""Pictures of almost one colour, neither black nor white: fog, a covered lens, a failed conversion."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import Known
from components.contracts.issues import Issue, Need
from components.findings._unusual import threshold

NAME = "flat"


class Finding(BaseModel):
    """The score is the standard deviation of luminance; a black or white picture is dark or bright."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    always: float = Field(default=0.004, ge=0, le=1)
    """Score at and under which a picture is an issue in any data set: one grey level of 255."""
    unusual: float = Field(default=0.02, ge=0, le=1)
    """The same where the others have more contrast."""

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing but the facts."""
        return frozenset()

    def look(self, known: Known) -> list[Issue]:
        """Every flat picture, the flattest first."""
        table = known.table
        spread = np.log(np.maximum(table["contrast"].to_numpy(float), 1e-6))
        limit = float(np.exp(threshold(spread, always=_log(self.always), at_most=_log(self.unusual), least_spread=0.25)))
        found = table[(table["contrast"] <= limit) & (table["brightest"] > 0.05) & (table["darkest"] < 0.95)]
        return [
            known.issue(
                NAME,
                [row["path"]],
                severity="warning",
                score=row["contrast"],
                threshold=limit,
                detail=f"its luminance varies by {row['contrast']:.1%} of the range",
                action="look whether it shows what it is labelled as; remove it, or take it anew",
            )
            for row in found.sort_values(["contrast", "sha256", "label"]).to_dict("records")
        ]


def _log(value: float) -> float:
    return float(np.log(max(value, 1e-6)))
