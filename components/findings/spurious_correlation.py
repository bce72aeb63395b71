"""Spurious correlation: a property of the files, such as their brightness or their size, that gives away the label.

A model may learn it in place of what the pictures show: it is right in the test set then, too, and wrong in the world. Each
property alone is asked to tell each class from the others, on pictures that were not learned from: 0 is chance, 1 always
right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import Known
from components.contracts.issues import Issue, Need
from components.contracts.verdicts import Estimate
from components.intervals import difference, wilson

if TYPE_CHECKING:
    import pandas as pd

NAME = "spurious_correlation"
Numbers = npt.NDArray[np.int64]

_FOLDS = 5
_MOST_BINS = 24
_SHOWN = 3
_WORDS = {
    "brightness": "brightness",
    "contrast": "contrast",
    "sharpness": "sharpness",
    "size": "size in pixels",
    "aspect": "aspect ratio",
    "bytes": "size in bytes",
    "format": "file format",
    "mode": "colour mode",
    "source": "source",
}


class Finding(BaseModel):
    """One issue a property; the score is 1 minus the low end of the interval of what it tells about a class."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float = Field(default=0.4, gt=0, lt=1)
    min_pictures: int = Field(default=20, ge=5)
    """A class of fewer pictures is not asked about."""

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing but the facts."""
        return frozenset()

    def look(self, known: Known) -> list[Issue]:
        """Every property that gives away a class, the most telling one first."""
        table = known.table.reset_index(drop=True)
        counts = table["label"].value_counts()
        classes = sorted(name for name in counts.index if counts[name] >= self.min_pictures)
        if len(counts) < 2 or not classes:
            return []
        names = sorted(counts.index)
        place = {name: number for number, name in enumerate(names)}
        labels = table["label"].map(place).to_numpy(np.int64)
        # Equal pictures share a fold: what was learned from a picture would be asked about itself.
        folds = np.array([hashlib.sha256(picture.encode()).digest()[0] % _FOLDS for picture in table["picture"]])
        found = []
        for name, bins in _properties(table):
            told = _told(bins, labels, len(names), folds)
            gains = {label: _gain(*told[:, place[label]]) for label in classes}
            given_away = sorted(
                (label for label in classes if 1 - gains[label].low <= self.threshold),
                key=lambda label: (-gains[label].low, label),
            )
            if given_away:
                found.append(self._issue(known, name, given_away, gains[given_away[0]]))
        return sorted(found, key=lambda issue: (issue.score, issue.detail))

    def _issue(self, known: Known, name: str, labels: list[str], gain: Estimate) -> Issue:
        shown = ", ".join(labels[:_SHOWN]) + (f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else "")
        return known.issue(
            NAME,
            [],
            severity="warning",
            score=1 - gain.low,
            threshold=self.threshold,
            detail=(
                f"the {_WORDS[name]} alone gives away {shown}: {gain.value:.2f} [{gain.low:.2f}, {gain.high:.2f}] for "
                f"{labels[0]}, where 0 is chance and 1 is always right"
            ),
            action=(
                f"find out how the pictures of {labels[0]} came by their {_WORDS[name]}; make or collect some without it, "
                f"or a model may learn that instead of what they show"
            ),
            about=name,
        )


def _properties(table: pd.DataFrame) -> Iterator[tuple[str, Numbers]]:
    """The name of each property that varies, and the bin of each picture."""
    columns = {
        **{name: table[name] for name in ("brightness", "contrast", "sharpness", "bytes", "format", "mode")},
        "size": table["width"] * table["height"],
        "aspect": table["width"] / table["height"],
    }
    if "source" in table:
        columns["source"] = table["source"]
    for name, column in columns.items():
        bins = _bins(column)
        if bins.max(initial=0) > 0:
            yield name, bins


def _bins(column: pd.Series) -> Numbers:
    """Numbers by their quantiles; of anything else each value by itself, where there are many the rarer ones together."""
    values = column.to_numpy()
    if values.dtype.kind not in "iuf":
        _, place, counts = np.unique(values.astype(str), return_inverse=True, return_counts=True)
        rank = np.empty(len(counts), dtype=np.int64)
        rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
        found: Numbers = np.minimum(rank[place], _MOST_BINS - 1)
        return found
    # Few pictures a bin tell little about what is usual in it.
    number = int(np.clip(len(values) // 10, 2, _MOST_BINS))
    edges = np.unique(np.quantile(values, np.linspace(0, 1, number + 1)[1:-1]))
    return np.searchsorted(edges, values, side="left").astype(np.int64)


def _told(bins: Numbers, labels: Numbers, num_classes: int, folds: Numbers) -> Numbers:
    """Of each class (4, classes): pictures taken for it, of how many of it, and others taken for it, of how many.

    A bin is taken for a class where that is more frequent in it than the others are, on the other folds.
    """
    counts = np.zeros((_FOLDS, int(bins.max()) + 1, num_classes), dtype=np.int64)
    np.add.at(counts, (folds, bins, labels), 1)
    hits, alarms = np.zeros(num_classes, dtype=np.int64), np.zeros(num_classes, dtype=np.int64)
    for fold in range(_FOLDS):
        learned, asked = counts.sum(axis=0) - counts[fold], counts[fold]
        of_class, of_all = learned.sum(axis=0), learned.sum()
        others = learned.sum(axis=1, keepdims=True) - learned
        taken = learned / np.maximum(of_class, 1) > others / np.maximum(of_all - of_class, 1)
        hits += (asked * taken).sum(axis=0)
        alarms += ((asked.sum(axis=1, keepdims=True) - asked) * taken).sum(axis=0)
    members = np.bincount(labels, minlength=num_classes)
    return np.stack([hits, members, alarms, len(labels) - members])


def _gain(hits: int, members: int, alarms: int, others: int) -> Estimate:
    """Share of the class that is found, minus share of the others that are taken for it, with its 95 % interval."""
    return difference(wilson(int(hits), int(members)), wilson(int(alarms), int(others)))
