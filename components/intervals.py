"""95 % intervals: Wilson's and the exact one of a share, Newcombe's of a difference of shares, the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from components.contracts.verdicts import Estimate

_Z95 = 1.959963984540054
RESAMPLES = 1000
SEED = 20240717
Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Right = np.ndarray[tuple[int], np.dtype[np.bool_]]
Counts = tuple[int, int, int, int]
"""Images that both, only the first, only the second and neither got right."""


def wilson(hits: int, n: int, *, z: float = _Z95) -> Estimate:
    """Share hits / n with its Wilson score interval, 95 % or that of `z`; raises ValueError on n = 0."""
    if n <= 0:
        raise ValueError("a share of no images has no value")
    share, z2 = hits / n, z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # Rounding must not put the value outside its own interval at 0 and 1.
    low, high = min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))
    return Estimate(value=share, low=low, high=high, n=n, method="wilson")


def exact(hits: int, n: int) -> Estimate:
    """Share hits / n with the 95 % interval of Clopper and Pearson (1934), which errs on neither side more than 2.5 %.

    Wilson's is narrower, and on the side of the nearer end errs more often: of shares of 3 % in 500 images its lower limit
    lies above 3 % in 3.1 %, of shares of 4 % in 24 images above 4 % in 6.9 %.
    """
    if n <= 0:
        raise ValueError("a share of no images has no value")
    from scipy.special import betaincinv

    low = float(betaincinv(hits, n - hits + 1, 0.025)) if hits else 0.0
    high = float(betaincinv(hits + 1, n - hits, 0.975)) if hits < n else 1.0
    return Estimate(value=hits / n, low=low, high=high, n=n, method="clopper-pearson")


def difference(first: Estimate, second: Estimate) -> Estimate:
    """first - second, of shares of different images, with Newcombe's interval (1998, method 10); n is the smaller one.

    For shares of the same images, whose answers agree more often than not, it is wider than it need be.
    """
    value = first.value - second.value
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    high = value + math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value=value, low=low, high=high, n=min(first.n, second.n), method="newcombe")


def paired_counts(first: Right, second: Right) -> Counts:
    """Of right answers to the same images: how many both, only the first, only the second and neither gave."""
    both, only_first = int((first & second).sum()), int((first & ~second).sum())
    only_second = int((~first & second).sum())
    return both, only_first, only_second, len(first) - both - only_first - only_second


def paired_difference(first: Right, second: Right) -> Estimate:
    """mean(first) - mean(second) over the same images, with its interval; raises ValueError where there are none."""
    counts = paired_counts(first, second)
    low, high = paired_interval(*counts)
    # Of whole images: the difference of two rounded means of 100 images can be 0.010000000000000009.
    value = (counts[1] - counts[2]) / len(first)
    return Estimate(value=value, low=min(low, value), high=max(high, value), n=len(first), method="newcombe, paired")


def paired_interval(both: int, only_first: int, only_second: int, neither: int, *, z: float = _Z95) -> tuple[float, float]:
    """Interval of the difference of two shares over the same images, from how many fall into each group; 95 %, or of `z`.

    Newcombe's (1998, method 10), which stays valid when few or no answers differ.
    """
    n = both + only_first + only_second + neither
    p1, p2 = wilson(both + only_first, n, z=z), wilson(both + only_second, n, z=z)
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


def resamples(n: int) -> Labels:
    # A fixed seed: the same answers must give the same interval on every rerun and machine.
    picks: Labels = np.random.default_rng(SEED).integers(0, n, size=(RESAMPLES, n))
    return picks


def rounds_percentile(rounds: Sequence[Floats], percentile: float) -> Estimate:
    """The median over rounds of a percentile of each, with its 95 % bootstrap interval over rounds and over their runs.

    Runs of one round met the same moment of the machine, so that drawing runs alone would promise too much. A percentile
    of so few runs cannot lie above the slowest of them: where runs are few, the upper limit is a little too low.
    """
    table = np.stack(rounds)
    number, runs = table.shape
    draw = np.random.default_rng(SEED)

    def middle(of: Floats) -> float:
        return float(np.median(np.percentile(of, percentile, axis=1)))

    def drawn() -> float:
        rows = draw.integers(0, number, size=(number, 1))
        return middle(table[rows, draw.integers(0, runs, size=(number, runs))])

    # One after another: all at once they take a thousand times the memory of the runs.
    sampled = np.array([drawn() for _ in range(RESAMPLES)])
    return interval(middle(table), sampled, number * runs, "bootstrap over rounds and runs")


def bootstrap(value: float, resampled: Floats, n: int) -> Estimate:
    return interval(value, resampled, n, "bootstrap")


def interval(value: float, sampled: Floats, n: int, method: str) -> Estimate:
    low, high = np.quantile(sampled, [0.025, 0.975])
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value), n=n, method=method)
