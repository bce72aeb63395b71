"""What is unusual in a data set: far from its other pictures, and not just low by a number that suits other data."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MIN_FILES = 20
"""Of fewer it cannot be told what is usual."""
_SPREADS = 4.5
"""Robust standard deviations from the median; of a normal distribution 3 in a million lie under it."""
_TO_DEVIATION = 1.4826
"""From the median absolute deviation to the standard deviation of a normal distribution."""


def threshold(values: npt.NDArray[np.float64], *, always: float, at_most: float, least_spread: float) -> float:
    """The value at and under which a picture is an issue: `always` in any data set, up to `at_most` where it is unusual.

    `least_spread` stands for the spread of data that are all alike, in which a small difference says nothing.
    """
    if len(values) < MIN_FILES:
        return always
    middle, spread = middle_and_spread(values)
    return float(np.clip(middle - _SPREADS * max(spread, least_spread), always, at_most))


def middle_and_spread(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Median and robust standard deviation, which a tenth of odd pictures does not move far."""
    middle = float(np.median(values))
    return middle, _TO_DEVIATION * float(np.median(np.abs(values - middle)))
