"""Copies of a picture under the same class: stored again, resized, cropped, mirrored or changed a little."""

from __future__ import annotations

from collections import Counter

from pydantic import BaseModel, ConfigDict, Field

from components.clusters import joined_by
from components.contracts.families import Known
from components.contracts.issues import Issue, Need, Pair

NAME = "near_duplicate"


class Finding(BaseModel):
    """The score is how far apart the pixels of the two are that are most alike.

    Equal pixels are an exact duplicate, copies under two classes a contradictory label, copies in and outside test a leak.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float = Field(default=1.0, ge=0, le=1)
    """Score over which two pictures are not taken for copies here."""

    @property
    def needs(self) -> frozenset[Need]:
        """Pairs that were verified on their pixels."""
        return frozenset({"pairs"})

    def look(self, known: Known) -> list[Issue]:
        """One issue for all files that are joined by pairs, the candidate to keep last: the one that has most pixels."""
        columns = [known.table["path"], known.table["label"]]
        columns += [known.table["split"]] if "split" in known.table else []
        side = {path: rest for path, *rest in zip(*columns, strict=True)}
        joined = [
            pair
            for pair in known.pairs or ()
            if pair.relation != "pixels" and pair.score <= self.threshold and side[pair.first] == side[pair.second]
        ]
        facts = known.table[known.table["path"].isin({file for pair in joined for file in (pair.first, pair.second)})]
        rank = {row["path"]: (row["width"] * row["height"], row["bytes"], row["sha256"]) for row in facts.to_dict("records")}
        issues = []
        for pairs in _groups(joined):
            *copies, kept = sorted({file for pair in pairs for file in (pair.first, pair.second)}, key=rank.__getitem__)
            kinds = ", ".join(
                f"{count} {relation}" for relation, count in sorted(Counter(p.relation for p in pairs).items())
            )
            issues.append(
                known.issue(
                    NAME,
                    [*copies, kept],
                    severity="warning",
                    score=min(pair.score for pair in pairs),
                    threshold=self.threshold,
                    detail=f"{len(copies) + 1} files show the same picture ({kinds})",
                    action=f"keep {kept} and remove the others; the picture counts several times in training",
                    candidate=kept,
                )
            )
        return sorted(issues, key=lambda issue: (issue.score, issue.id))


def _groups(pairs: list[Pair]) -> list[list[Pair]]:
    """Pairs that are joined by a file."""
    joined = joined_by((pair.first, pair.second) for pair in pairs)
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(joined[pair.first], []).append(pair)
    return list(found.values())
