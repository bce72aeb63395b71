"""95 % intervals: Wilson's and the exact one of a share, Newcombe's of a difference of shares, the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    share = hits / n
    low, high = _wilson(share, n, z)
    return Estimate(value=share, low=low, high=high, n=n, method="wilson")


def _wilson(share: float, n: float, z: float = _Z95) -> tuple[float, float]:
    z2 = z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # Rounding must not put the value outside its own interval at 0 and 1.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


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
    product = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    phi = 0.0
    if product > 0:
        cross = float(both * neither - only_first * only_second)
        # Newcombe's continuity correction for positive association.
        cross = max(cross - n / 2, 0) if cross > 0 else cross
        phi = cross / math.sqrt(product)
    return _of_difference((p1.value, p1.low, p1.high), (p2.value, p2.low, p2.high), phi)


def _of_difference(first: tuple[float, float, float], second: tuple[float, float, float], phi: float) -> tuple[float, float]:
    """Interval of a difference from each side's value, lower and upper limit, and how both go together."""
    difference = first[0] - second[0]
    lower1, upper1 = first[0] - first[1], first[2] - first[0]
    lower2, upper2 = second[0] - second[1], second[2] - second[0]
    low = difference - math.sqrt(max(0.0, lower1**2 - 2 * phi * lower1 * upper2 + upper2**2))
    high = difference + math.sqrt(max(0.0, upper1**2 - 2 * phi * upper1 * lower2 + lower2**2))
    return low, high


@dataclass(frozen=True)
class PairedScores:
    """Two scores from 0 to 1 of each of n images, such as the share of its corruptions that are answered rightly.

    As many moments of them as their means' difference needs: those of more images of the same kind have another n alone.
    """

    n: int
    gained: tuple[float, float]
    """Mean and variance of what the first has more, 0 where it has less."""
    lost: tuple[float, float]
    """The same of what the first has less."""

    @classmethod
    def of(cls, first: Floats, second: Floats) -> PairedScores:
        """Raises ValueError where there are none."""
        if len(first) == 0:
            raise ValueError("scores of no images have no mean")
        sides = (np.maximum(first - second, 0), np.maximum(second - first, 0))
        gained, lost = ((float(side.mean()), float(side.var())) for side in sides)
        return cls(len(first), gained, lost)

    def interval(self) -> tuple[float, float]:
        """95 % interval of mean(first) - mean(second), which is the mean gain less the mean loss.

        Both have the interval of `mean_interval`, and are combined as Newcombe's method 10 does; Zou and Donner (2008) show
        that any two intervals may be. Wilson's knows that few losses are skewed, and stays wide where nothing differs.
        """
        gain, loss = (mean_interval(mean, variance, self.n) for mean, variance in (self.gained, self.lost))
        spread = math.sqrt(self.gained[1] * self.lost[1])
        # An image that gains does not lose.
        phi = -gain.value * loss.value / spread if spread > 0 else 0.0
        return _of_difference((gain.value, gain.low, gain.high), (loss.value, loss.low, loss.high), phi)


def mean_interval(mean: float, variance: float, n: int) -> Estimate:
    """Mean of n scores from 0 to 1, one an image, with its 95 % interval: Wilson's, of an effective number of images.

    That is the number of images whose answers, each right or wrong, would have a mean of the same variance (Dean and Pagano
    2015): n where each score is 0 or 1, more where images are partly right. Both variances are taken with Wilson's two
    right and two wrong images added, so that it stays n, and the interval wide, where no score differs from another.
    """
    if n <= 0:
        raise ValueError("scores of no images have no mean")
    low, high = _wilson(mean, _effective(mean, variance, n))
    return Estimate(value=mean, low=low, high=high, n=n, method="wilson of the effective n")


def _effective(mean: float, variance: float, n: int) -> float:
    added = _Z95**2
    centre = (n * mean + added / 2) / (n + added)
    square = (n * (variance + mean**2) + added / 2) / (n + added)
    return n * centre * (1 - centre) / (square - centre**2)


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
