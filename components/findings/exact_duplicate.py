"""The same picture several times under one class: equal pixels, whatever the files are called or how they are encoded."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from components.contracts.families import Known
from components.contracts.issues import Issue, Need
from components.findings._equal import equal_pictures

NAME = "exact_duplicate"


class Finding(BaseModel):
    """One issue for each picture that is there more than once; a picture under several classes is a contradictory label."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing but the facts."""
        return frozenset()

    def look(self, known: Known) -> list[Issue]:
        """The files of each such picture; the first path is the one to keep, so it is the candidate."""
        issues = []
        for rows in equal_pictures(known.table):
            if rows["label"].nunique() > 1:
                continue
            kept, *copies = sorted(rows["path"])
            issues.append(
                known.issue(
                    NAME,
                    [*copies, kept],
                    severity="warning",
                    score=0.0,
                    threshold=0.0,
                    detail=f"{len(copies) + 1} files hold the same picture",
                    action=f"keep {kept} and remove the others; the picture counts several times in training",
                    candidate=kept,
                )
            )
        return issues
