"""One picture under several classes: equal pixels, or, where copies were looked for, a copy of it under another class."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from components.contracts.families import Known
from components.contracts.issues import Issue, Need
from components.findings._equal import equal_pictures

NAME = "contradictory_label"


class Finding(BaseModel):
    """The score is how far apart the files' pixels are. Validation leaves those of equal pixels out of training and test."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing but the facts; of pairs it takes what there is."""
        return frozenset()

    def look(self, known: Known) -> list[Issue]:
        """The files of each such picture, those under the rarer label first; the label of most of them is the candidate."""
        issues = []
        for rows in equal_pictures(known.table):
            counts = rows["label"].value_counts()
            if len(counts) < 2:
                continue
            most = sorted(counts[counts == counts.iloc[0]].index)
            files = rows.assign(of_most=rows["label"].isin(most)).sort_values(["of_most", "path"])["path"]
            issues.append(
                known.issue(
                    NAME,
                    list(files),
                    severity="warning",
                    score=0.0,
                    threshold=1.0,
                    detail=f"the same picture is labelled {' and '.join(repr(label) for label in sorted(counts.index))}",
                    action="decide on one label and remove the other files; until then none of them is used",
                    candidate=most[0] if len(most) == 1 else "",
                )
            )
        label = dict(zip(known.table["path"], known.table["label"], strict=True))
        for pair in sorted(known.pairs or (), key=lambda pair: pair.score):
            right, other = label[pair.first], label[pair.second]
            if pair.relation == "pixels" or right == other:
                continue
            issues.append(
                known.issue(
                    NAME,
                    [pair.second, pair.first],
                    severity="warning",
                    score=pair.score,
                    threshold=1.0,
                    detail=f"labelled {other!r}, and a copy ({pair.relation}) is labelled {right!r}",
                    action="decide which label is right, and give it to both or remove one of them",
                    candidate=right,
                )
            )
        return issues
