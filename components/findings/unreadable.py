"""Files that are no whole, still picture that can be decoded and read, or that lie outside of the class folders."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from components.contracts.families import Known
from components.contracts.issues import Issue, Need

NAME = "unreadable"


class Finding(BaseModel):
    """Validation counts such files and leaves them out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing but the facts."""
        return frozenset()

    def look(self, known: Known) -> list[Issue]:
        """Every file that cannot be used, and why."""
        return [
            known.issue(
                NAME,
                [row["path"]],
                severity="warning",
                score=0.0,
                threshold=0.0,
                detail=row["reason"],
                action="bring a whole picture in an accepted format in its place, or remove it; until then it is left out",
            )
            for row in known.refused.sort_values("path").to_dict("records")
        ]
