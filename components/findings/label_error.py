"""Label errors: pictures whose label a head that never saw them does not believe, by confident learning.

Northcutt et al., "Confident Learning" (2021), by cleanlab: how many labels are wrong is counted from the probabilities of
the other pictures of each class, and so many pictures whose label is least likely are the issues. About half of what such a
search finds in well-kept data is right after all, so it is a question to a person.
"""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import Known
from components.contracts.issues import Issue, Need

NAME = "label_error"


class Finding(BaseModel):
    """The score is the probability of the label that the picture has; the candidate is the likeliest one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_pictures: int = Field(default=5, ge=2)
    """A class of fewer pictures is left out: a head that learned from hardly any of it does not know it."""

    @property
    def needs(self) -> frozenset[Need]:
        """Out-of-fold probabilities."""
        return frozenset({"probabilities"})

    def look(self, known: Known) -> list[Issue]:
        """Every picture that probably has another label, the least likely one first."""
        assert known.probabilities is not None
        counts = Counter(known.table["label"])
        kept = [position for position, name in enumerate(known.classes) if counts[name] >= self.min_pictures]
        classes = [known.classes[position] for position in kept]
        table = known.table.reset_index(drop=True)
        rows = np.flatnonzero(table["label"].isin(classes).to_numpy())
        if len(classes) < 2:
            return []
        probabilities = known.probabilities[rows][:, kept].astype(np.float64)
        probabilities /= np.maximum(probabilities.sum(axis=1, keepdims=True), 1e-12)
        place = {name: position for position, name in enumerate(classes)}
        labels = np.array([place[label] for label in table["label"].iloc[rows]], dtype=np.int64)
        own = probabilities[np.arange(len(rows)), labels]
        likeliest = probabilities.argmax(axis=1)
        found = [row for row in _least_likely(labels, probabilities) if likeliest[row] != labels[row]]
        if not found:
            return []
        threshold = float(max(own[row] for row in found))
        paths, names = table["path"].to_numpy(), table["label"].to_numpy()
        return [
            known.issue(
                NAME,
                [paths[rows[row]]],
                severity="warning",
                score=own[row],
                threshold=threshold,
                detail=(
                    f"labelled {names[rows[row]]}, looks like {classes[likeliest[row]]} (probability "
                    f"{probabilities[row, likeliest[row]]:.2f} against {own[row]:.2f})"
                ),
                action=f"look at it: relabel it as {classes[likeliest[row]]}, or keep its label",
                candidate=classes[likeliest[row]],
            )
            for row in found
        ]


def _least_likely(labels: np.ndarray[tuple[int], np.dtype[np.int64]], probabilities: np.ndarray) -> list[int]:
    """Rows whose label confident learning does not believe, the least likely label first."""
    from cleanlab.filter import find_label_issues

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = find_label_issues(
            labels, probabilities, filter_by="low_self_confidence", return_indices_ranked_by="self_confidence", n_jobs=1
        )
    return [int(row) for row in found]
