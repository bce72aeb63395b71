"""Pictures that are out of focus or moved, so much that a network would see it.

Full-size sharpness says little: a photograph that was enlarged or cleaned of noise has none and looks well. So the picture
is made small first (128 pixels), and what is fine in it is compared with what is coarse, whatever its contrast.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import Known
from components.contracts.issues import Issue, Need
from components.findings._unusual import threshold

NAME = "blurred"
_LEAST_CONTRAST = 0.02
"""Under it there is nothing that could be sharp; such a picture is flat, dark or bright."""


class Finding(BaseModel):
    """The score is the variance of the small picture's Laplacian over that of its luminance, at most 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    always: float = Field(default=0.004, gt=0, le=1)
    """Score at and under which a picture is an issue in any data set: a blur over about 2 % of its long side."""
    unusual: float = Field(default=0.05, gt=0, le=1)
    """The same where the others are sharper."""

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing but the facts."""
        return frozenset()

    def look(self, known: Known) -> list[Issue]:
        """Every blurred picture, the most blurred first."""
        table = known.table[(known.table["contrast"] > _LEAST_CONTRAST) & (known.table["short_side"] >= 8)]
        detail = np.log(np.maximum(table["detail"].to_numpy(float), 1e-9))
        lowest, highest = float(np.log(self.always)), float(np.log(self.unusual))
        limit = float(np.exp(threshold(detail, always=lowest, at_most=highest, least_spread=0.25)))
        found = table[table["detail"] <= limit].sort_values(["detail", "sha256", "label"])
        return [
            known.issue(
                NAME,
                [row["path"]],
                severity="warning",
                score=row["detail"],
                threshold=limit,
                detail=f"it has {row['detail'] / limit:.0%} of the fine detail that is the least here",
                action="look whether what it is labelled as can still be told; remove it, or take it anew",
            )
            for row in found.to_dict("records")
        ]
