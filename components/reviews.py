"""Reviews: what people decided about issues of the data. They are pinned with the version that came of them.

An issue that was reviewed is not asked about again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

from components.companions import REVIEWS


@dataclass(frozen=True)
class Review:
    """One person's decision about one issue."""

    issue: str
    """The issue's id."""
    decision: str
    who: str
    when: str
    """UTC, ISO 8601."""
    why: str
    note: str = ""
    """What was said of this issue alone."""


def reviews(root: Path) -> dict[str, Review]:
    """The reviews of a workspace's data, by the issue's id; raises DataError for what is no list of them."""
    rows = REVIEWS.read(root)[list(REVIEWS.columns)].itertuples(index=False, name=None)
    return {row[0]: Review(*row) for row in rows}


def add_reviews(root: Path, new: Iterable[Review]) -> None:
    """Write reviews to those that are there, which stay as they are; `dataversions.pin` makes them part of a version."""
    found = {review.issue: review for review in new} | reviews(root)
    REVIEWS.write(root, REVIEWS.frame({issue: astuple(review)[1:] for issue, review in found.items()}))
