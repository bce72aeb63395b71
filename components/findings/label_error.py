"""Label errors: pictures whose label a head that never saw them does not believe, by confident learning.

Northcutt et al., "Confident Learning" (2021), by cleanlab: how many labels are wrong is counted from the probabilities of
the other pictures of each class, and so many pictures whose label is least likely are looked at. Where the head is often
wrong itself, most of these labels are right; so each of them is asked how probable it is that it was drawn at random, as
the share of labels is that explains all of them best, and only what is probable enough is an issue. It stays a question to
a person: what is rare in its class looks like a wrong label, too.
"""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import Known
from components.contracts.issues import Issue, Need

NAME = "label_error"
Numbers = npt.NDArray[np.float64]


class Finding(BaseModel):
    """The score is the probability of the label that the picture has; the candidate is the likeliest one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_pictures: int = Field(default=5, ge=2)
    """A class of fewer pictures is left out: a head that learned from hardly any of it does not know it."""

    min_probability: float = Field(default=0.25, gt=0, lt=1)
    """How probable it has to be that the label is wrong."""

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
        wrong = _wrong(own, len(classes))
        found = [
            row
            for row in _least_likely(labels, probabilities)
            if likeliest[row] != labels[row] and wrong[row] >= self.min_probability
        ]
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


def _wrong(own: Numbers, num_classes: int) -> Numbers:
    """How probable it is that a label was drawn at random and is wrong, from the probability (n,) of each picture's label.

    The share of labels that are drawn is the likeliest one; expectation-maximisation finds it.
    """
    share = 0.05
    for _ in range(200):
        drawn = share / num_classes / ((1 - share) * own + share / num_classes)
        share = float(drawn.mean())
    # One that is drawn is right by chance as often as its picture shows that class.
    return drawn * (1 - own)


def _least_likely(labels: npt.NDArray[np.int64], probabilities: Numbers) -> list[int]:
    """Rows whose label confident learning does not believe, the least likely label first."""
    from cleanlab.filter import find_label_issues

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = find_label_issues(
            labels, probabilities, filter_by="low_self_confidence", return_indices_ranked_by="self_confidence", n_jobs=1
        )
    return [int(row) for row in found]
