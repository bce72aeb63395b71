"""What a statistic looks like without any drift: thresholds from resampling the reference at the window's size.

A window without drift is a draw from what the reference was drawn from, and the reference is itself a draw. So both sides
are resampled from the reference, at their own sizes, and compared with each other: resampling the window alone would take
the reference for the truth and alarm too often (Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 16).

Resampling is done on counts over the sorted reference, so it costs the same for a window of 200 and of 100,000.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from components.contracts.verdicts import enough, too_few
from components.contracts.wording import counted

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
ROUNDS = 4000
_CHUNK = 250
POWER = 0.8
_Z_POWER = 0.8416212335729143
"""Standard normal quantile of POWER."""


def resampled(rng: np.random.Generator, num_reference: int, size: int, rounds: int) -> Counts:
    """How often each of the reference's images is drawn: (rounds, num_reference), each row summing to `size`."""
    if size > 8 * num_reference:
        return rng.multinomial(size, np.full(num_reference, 1 / num_reference), size=rounds)
    picks = rng.integers(0, num_reference, size=(rounds, size))
    picks += np.arange(rounds)[:, None] * num_reference
    return np.bincount(picks.ravel(), minlength=rounds * num_reference).reshape(rounds, num_reference)


def null_wasserstein(reference: Floats, size: int, *, seed: int, rounds: int = ROUNDS) -> Floats:
    """Wasserstein distances, normed by the reference's standard deviation, without drift: (rounds, columns).

    `reference` is (images, columns); the columns of one image stay together.
    """
    rng = np.random.default_rng(seed)
    num, columns = reference.shape
    order = np.argsort(reference, axis=0, kind="stable")
    ordered = np.take_along_axis(reference, order, axis=0)
    gaps = np.diff(ordered, axis=0)
    found = np.empty((rounds, columns))
    for start in range(0, rounds, _CHUNK):
        stop = min(start + _CHUNK, rounds)
        ours = resampled(rng, num, num, stop - start)
        theirs = resampled(rng, num, size, stop - start)
        mean = ours @ reference / num
        deviation = np.sqrt(np.maximum(ours @ reference**2 / num - mean**2, 0))
        for column in range(columns):
            difference = ours[:, order[:, column]] / num - theirs[:, order[:, column]] / size
            distance = np.abs(np.cumsum(difference, axis=1)[:, :-1]) @ gaps[:, column]
            found[start:stop, column] = distance / np.maximum(deviation[:, column], 0.001)
    return found


def jensen_shannon(ours: Floats, theirs: Floats) -> Floats:
    """Jensen-Shannon distance (natural logarithm, square root) between rows of shares; (n, classes) each."""
    middle = (ours + theirs) / 2

    def divergence(shares: Floats) -> Floats:
        ratio = np.divide(shares, middle, out=np.ones_like(shares), where=shares > 0)
        total: Floats = (shares * np.log(ratio)).sum(axis=1)
        return total

    found: Floats = np.sqrt(np.maximum((divergence(ours) + divergence(theirs)) / 2, 0))
    return found


def null_jensen_shannon(shares: Floats, num_reference: int, size: int, *, seed: int, rounds: int = ROUNDS) -> Floats:
    """Jensen-Shannon distances between the classes of a reference and of a window without drift: (rounds,)."""
    rng = np.random.default_rng(seed)
    ours = rng.multinomial(num_reference, shares, size=rounds) / num_reference
    theirs = rng.multinomial(size, shares, size=rounds) / size
    return jensen_shannon(ours, theirs)


def smallest_class_shift(
    shares: Floats, num_reference: int, size: int, threshold: float, trivial: float, *, seed: int
) -> float:
    """Smallest share of predictions that, gone to another class, alarms in 80 % of the windows.

    In the direction that shows least: from the largest classes into the next largest, where the distance grows slowest.
    """
    rng = np.random.default_rng(seed)
    order = np.argsort(-shares, kind="stable")
    for share in np.geomspace(0.005, 1.0, 40):
        moved = shares.copy()
        left = float(share)
        for source in order:
            taken = min(left, float(moved[source]) if source != order[-1] else 0.0)
            moved[source] -= taken
            left -= taken
            if left <= 0:
                # Into the largest of those that gave nothing.
                moved[next(c for c in order if moved[c] == shares[c])] += share
                break
        if left > 0:
            continue
        ours = rng.multinomial(num_reference, shares, size=400) / num_reference
        theirs = rng.multinomial(size, moved / moved.sum(), size=400) / size
        alarms = (jensen_shannon(ours, theirs) > threshold) & (np.abs(ours - theirs).sum(axis=1) / 2 >= trivial)
        if float(alarms.mean()) >= POWER:
            return float(share)
    return 1.0


def smallest_displacement(least: float, num_reference: int, size: int) -> float:
    """Smallest shift of a mean, in standard deviations, of which the distance exceeds `least` in 80 % of the windows.

    The Wasserstein distance is at least the difference of the means, so this errs on the large side.
    """
    return least + _Z_POWER * float(np.sqrt(1 / num_reference + 1 / size))


def undecided(shown: str, matters: str, smallest: float, material: float, num_reference: int, size: int) -> str:
    """Why a quiet window is inconclusive, and how many images would decide: what could be seen shrinks with both samples.

    `smallest` and `material` are counted from nothing, `shown` and `matters` are the same two as a reader knows them.
    """

    def decides(n: int) -> bool:
        return smallest * float(np.sqrt((1 / num_reference + 1 / n) / (1 / num_reference + 1 / size))) <= material

    needed = enough(decides, size)
    why = (
        too_few("images in the window", size, needed)
        if needed is not None
        else f"the reference of {counted(num_reference, 'image')} is too small to show that in any window; "
        "add test images, train again"
    )
    return f"no shift is shown, but one below {shown} could not be, and {matters} matters: {why}"


def undecided_displacement(smallest: float, material: float, num_reference: int, size: int) -> str:
    """`undecided` for shifts in standard deviations."""
    matters = f"{material:g}"
    return undecided(f"{smallest:.2f} standard deviations", matters, smallest, material, num_reference, size)


def trivial(material: float, nothing: float = 0.0) -> float:
    """What never alarms, however sure it is: half of the way from nothing to what matters.

    Not what matters itself: an estimate of just that size falls below it every other time.
    """
    return nothing + (material - nothing) / 2


def exceeded(null: Floats, alpha: float) -> float:
    """The value that at most a share `alpha` of draws without drift exceeds; infinite when there are too few of them."""
    # The observed value is one of rounds + 1 exchangeable ones.
    rank = int(np.ceil((len(null) + 1) * (1 - alpha))) - 1
    return float(np.sort(null)[rank]) if rank < len(null) else float("inf")


def p_value(null: Floats, value: float) -> float:
    """Share of draws without drift that are at least as large, the observed one included."""
    return float((np.count_nonzero(null >= value) + 1) / (len(null) + 1))
