"""No regression: not worse than the champion on the same images, compared pair by pair.

The interval of the paired difference of two shares is Newcombe's (1998, method 10), which stays valid when few or no
answers differ. Negative flips (images the champion got right and the candidate gets wrong) have a budget of their own:
users feel them even when the mean improves (Yan et al., "Positive-Congruent Training", 2021).
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from components.contracts import Evidence, Finding
from components.tasks.classification import wilson


class Gate(BaseModel):
    """Pass when the 95 % interval of (candidate - champion) lies above `-margin` and flips stay in their budget."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    margin: float = Field(default=0.02, gt=0, lt=1)
    max_negative_flips: float = Field(default=0.03, ge=0, le=1)

    def judge(self, evidence: Evidence) -> Finding:
        if not evidence.champion_known:
            return _inconclusive("the ledger does not say whether there is a champion")
        if evidence.champion is None:
            return Finding(
                gate="no_regression", status="not applicable", message="the ledger proves that no champion was ever promoted"
            )
        answers, champion = evidence.answers, evidence.champion
        if answers is None or len(answers.image_ids) == 0:
            return _inconclusive("no answers to compare")
        if answers.image_ids != champion.image_ids or not np.array_equal(answers.labels, champion.labels):
            return _inconclusive("the champion was not evaluated on the same images and labels")
        if not (np.isfinite(answers.logits).all() and np.isfinite(champion.logits).all()):
            return _inconclusive("non-finite logits")
        mine, theirs = answers.predicted == answers.labels, champion.predicted == champion.labels
        low, high = paired_difference(mine, theirs)
        n, difference = len(mine), float(mine.mean() - theirs.mean())
        flips = float((theirs & ~mine).mean())
        text = (
            f"candidate - champion {difference:+.4f} [{low:+.4f}, {high:+.4f}] (n={n}), margin {self.margin}; "
            f"negative flips {flips:.2%}, budget {self.max_negative_flips:.2%}"
        )
        if high < -self.margin or flips > self.max_negative_flips:
            status = "fail"
        else:
            status = "pass" if low >= -self.margin else "inconclusive"
        return Finding.model_validate(
            {
                "gate": "no_regression",
                "status": status,
                "message": text,
                "value": difference,
                "threshold": -self.margin,
                "n": n,
            }
        )


def paired_difference(
    first: np.ndarray[tuple[int], np.dtype[np.bool_]], second: np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> tuple[float, float]:
    """95 % interval of mean(first) - mean(second) over the same images."""
    n = len(first)
    both, only_first = int((first & second).sum()), int((first & ~second).sum())
    only_second = int((~first & second).sum())
    neither = n - both - only_first - only_second
    p1, p2 = wilson(both + only_first, n), wilson(both + only_second, n)
    difference = p1.value - p2.value
    product = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    phi = 0.0
    if product > 0:
        cross = float(both * neither - only_first * only_second)
        # Newcombe's continuity correction for positive association.
        cross = max(cross - n / 2, 0) if cross > 0 else cross
        phi = cross / math.sqrt(product)
    lower1, upper1 = p1.value - p1.low, p1.high - p1.value
    lower2, upper2 = p2.value - p2.low, p2.high - p2.value
    low = difference - math.sqrt(max(0.0, lower1**2 - 2 * phi * lower1 * upper2 + upper2**2))
    high = difference + math.sqrt(max(0.0, upper1**2 - 2 * phi * upper1 * lower2 + lower2**2))
    return low, high


def _inconclusive(message: str) -> Finding:
    return Finding(gate="no_regression", status="inconclusive", message=message)
