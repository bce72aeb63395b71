"""Copies of test pictures outside test: a model that has seen them is judged better than it is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import Known
from components.contracts.issues import Issue, Need

NAME = "leak"


class Finding(BaseModel):
    """The score is how far apart the pixels of the closest copy are. Files of equal pixels are always on one side."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float = Field(default=1.0, ge=0, le=1)
    """Score over which two pictures are not taken for copies here."""

    @property
    def needs(self) -> frozenset[Need]:
        """Pairs that were verified on their pixels, and which files are test."""
        return frozenset({"pairs", "split"})

    def look(self, known: Known) -> list[Issue]:
        """One issue for each test picture that has copies outside, the copies first."""
        side = dict(zip(known.table["path"], known.table["split"], strict=True))
        copies: dict[str, list[tuple[float, str, str]]] = {}
        for pair in known.pairs or ():
            if side[pair.first] != side[pair.second] and pair.score <= self.threshold:
                test, rest = (pair.first, pair.second) if side[pair.first] == "test" else (pair.second, pair.first)
                copies.setdefault(test, []).append((pair.score, rest, pair.relation))
        issues = []
        for test, found in copies.items():
            found.sort()
            kinds = ", ".join(dict.fromkeys(relation for _, _, relation in found))
            issues.append(
                known.issue(
                    NAME,
                    [*(rest for _, rest, _ in found), test],
                    severity="warning",
                    score=found[0][0],
                    threshold=self.threshold,
                    detail=f"{len(found)} outside test ({kinds}) show the same picture as the test picture {test}",
                    action="remove the files outside test: who is tested on what it was trained on is judged too well",
                    candidate=test,
                )
            )
        return sorted(issues, key=lambda issue: (issue.score, issue.id))
