"""Selective prediction: what an engine's answers are worth when it answers only where it is sure enough.

Coverage is the share of the images that are answered, risk the share of wrong ones among these. The curve runs through every
confidence that could be the threshold; AURC is the mean risk over it (Geifman and El-Yaniv, "Selective classification for
deep neural networks", 2017). Pure functions of confidences and of what was right; what these are is the task's to say.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from components.contracts.records import Record
from components.contracts.verdicts import Estimate
from components.intervals import Floats, bootstrap, resamples, wilson

_COVERAGES = (1.0, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Of the table; each at the highest threshold that answers no smaller share."""
_MOST_POINTS = 200
Confidences = npt.NDArray[np.float64]
Right = npt.NDArray[np.bool_]


class OperatingPoint(Record):
    """One way to answer: which share, and how much of that is wrong."""

    threshold: float | None
    """Confidence from which on is answered; None where that differs by class."""
    coverage: Estimate
    risk: Estimate | None
    """None where nothing is answered."""


class RiskCoverage(Record):
    """The curve of one engine on one split."""

    engine: str
    num_images: int
    aurc: Estimate
    """Area under the curve; an order of confidences that says nothing has the risk of answering everything."""
    points: tuple[OperatingPoint, ...]
    """The table, from full coverage down."""
    released: OperatingPoint | None
    """Where the release's decision rule lies; None of an engine without one."""
    curve: tuple[tuple[float, float], ...]
    """(coverage, risk) for drawing, thinned out where there are many."""


def risk_coverage(
    engine: str, confidence: Confidences, right: Right, *, answered: Right | None = None, threshold: float | None = None
) -> RiskCoverage:
    """The curve of `confidence` (n,) and `right` (n,); equal confidences are answered together or not at all.

    `answered` are the images on which the release's rule gives an answer, and `threshold` its threshold where it has one for
    all classes. Raises ValueError on no images, and on a confidence that is no finite number: it has no place on the curve.
    """
    if len(confidence) == 0:
        raise ValueError("no images: there is no curve")
    if not np.isfinite(confidence).all():
        raise ValueError(f"{int((~np.isfinite(confidence)).sum())} confidences are not finite numbers")
    n = len(confidence)
    order = np.argsort(-confidence, kind="stable")
    ranked, wrong = confidence[order], np.cumsum(~right[order])
    ends = np.flatnonzero(np.append(ranked[1:] < ranked[:-1], True))
    risks = wrong[ends] / (ends + 1)
    # Thinned out by coverage; the ends stay, or the curve would not reach full coverage.
    kept = np.unique(np.linspace(0, len(ends) - 1, min(len(ends), _MOST_POINTS)).round().astype(np.int64))
    cuts = sorted({int(ends[np.searchsorted(ends + 1, np.ceil(share * n - 1e-9))]) for share in _COVERAGES}, reverse=True)
    return RiskCoverage(
        engine=engine,
        num_images=n,
        aurc=_aurc(ranked, right[order]),
        points=tuple(_point(float(ranked[cut]), cut + 1, int(wrong[cut]), n) for cut in cuts),
        released=None if answered is None else _point(threshold, int(answered.sum()), int((answered & ~right).sum()), n),
        curve=tuple((float((ends[place] + 1) / n), float(risks[place])) for place in kept),
    )


def _point(threshold: float | None, num_answered: int, num_wrong: int, n: int) -> OperatingPoint:
    return OperatingPoint(
        threshold=threshold,
        coverage=wilson(num_answered, n),
        risk=wilson(num_wrong, num_answered) if num_answered else None,
    )


def _aurc(ranked: Confidences, right: Right) -> Estimate:
    """Of images in the order of their confidences, the surest first; with its bootstrap interval over images."""
    n = len(ranked)
    if right.all():
        # Images without a mistake have none when they are drawn again either, and zero would be told as certain. The upper
        # limit is that of the risk of answering everything, which is the area of confidences that say nothing.
        return Estimate(value=0.0, low=0.0, high=wilson(0, n).high, n=n, method="wilson, no mistake")
    sampled = np.array([_mean_risk(ranked[pick], right[pick]) for pick in map(np.sort, resamples(n))])
    return bootstrap(_mean_risk(ranked, right), sampled, n)


def _mean_risk(ranked: Confidences, right: Right) -> float:
    """The mean over k of the share of wrong answers among the k surest; of equal confidences, in no order.

    As k goes through images that are equally sure, each brings the mean of their mistakes.
    """
    starts = np.flatnonzero(np.append(True, ranked[1:] < ranked[:-1]))
    sizes = np.diff(np.append(starts, len(ranked)))
    wrong: Floats = np.repeat(np.add.reduceat((~right).astype(np.float64), starts) / sizes, sizes)
    return float((np.cumsum(wrong) / np.arange(1, len(wrong) + 1)).mean())


def rows(found: RiskCoverage) -> Sequence[tuple[str, str, str, str, str]]:
    """The table for people: threshold, coverage, risk, its interval, and images answered; the release's rule is marked."""
    points = [(point, False) for point in found.points]
    if found.released is not None:
        points.append((found.released, True))
    ordered = sorted(points, key=lambda each: (-each[0].coverage.value, each[1]))
    return [_row(point, is_released) for point, is_released in ordered]


def _row(point: OperatingPoint, is_released: bool) -> tuple[str, str, str, str, str]:
    threshold = "by class" if point.threshold is None else f"{point.threshold:.4f}"
    risk = point.risk
    return (
        f"{threshold} (the release's)" if is_released else threshold,
        f"{point.coverage.value:.1%}",
        "nothing is answered" if risk is None else f"{risk.value:.2%}",
        "" if risk is None else f"{risk.low:.2%} to {risk.high:.2%}",
        "0" if risk is None else str(risk.n),
    )
