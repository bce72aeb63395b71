"""Which unlabelled pictures to label next: where a model is unsure, what is unlike all that it knows, and no two alike.

A greedy k-center selection (Sener and Savarese, "Active Learning for Convolutional Neural Networks", 2018) whose distances
are weighted by uncertainty: at each step the picture joins whose distance to what is known or was chosen, times how unsure
its answer is, is the largest. Distances saturate, so that a few strange pictures do not hide those that the model confuses.
It ends where another picture would add little.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_OF_THE_SURE = 0.1
"""Weight of an answer given with confidence 1: what is new is worth a label even so."""
_LEAST_GAIN = 0.25
"""Share of the first picture's gain below which another one adds little."""
_UNLIKE = 2.0
"""Times the usual distance from which on a picture is called unlike what is known."""
_ROWS = 4096
_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Suggestion:
    """A picture that is worth a person's look."""

    row: int
    """Of the pool."""
    gain: float
    """What it added when it was chosen, as a share of what the first one did."""
    distance: float
    """Cosine distance to the nearest picture that the model knows, in [0, 2]."""
    unlike: float
    """That, in times of the usual distance between pictures that it knows."""

    @property
    def is_unlike(self) -> bool:
        return self.unlike >= _UNLIKE


def suggest(
    embeddings: npt.NDArray[np.floating], confidence: npt.NDArray[np.floating], known: npt.NDArray[np.floating], *, most: int
) -> list[Suggestion]:
    """At most `most` rows of a pool, best first, fewer where the others add little.

    `embeddings` (n, d) and `confidence` (n,) in [0, 1] are the pool's, `known` (m, d) those of pictures the model knows.
    Raises ValueError for embeddings of another width, values that are not finite, or no known picture.
    """
    if embeddings.ndim != 2 or known.ndim != 2 or embeddings.shape[1] != known.shape[1]:
        raise ValueError(f"embeddings of shapes {embeddings.shape} and {known.shape} cannot be compared")
    if len(known) == 0:
        raise ValueError("no known picture to compare with")
    if not (np.isfinite(embeddings).all() and np.isfinite(confidence).all() and np.isfinite(known).all()):
        raise ValueError("some values are not finite numbers")
    pool, there = _unit(embeddings), _unit(known)
    distance = _to_nearest(pool, there)
    usual = _usual(there)
    weight = _OF_THE_SURE + (1 - _OF_THE_SURE) * (1 - confidence.astype(np.float32))
    open_distance = distance
    found: list[Suggestion] = []
    first = 0.0
    while len(found) < min(most, len(pool)):
        gains = weight * open_distance / (open_distance + usual + 1e-12)
        row = int(gains.argmax())
        gain = float(gains[row])
        first = first or gain
        if gain <= 0 or gain < _LEAST_GAIN * first:
            break
        away = float(distance[row])
        found.append(Suggestion(row, gain / first, away, away / usual if usual else float("inf") if away else 0.0))
        open_distance = np.minimum(open_distance, _distances(pool, pool[row]))
        open_distance[row] = 0.0
    return found


def _unit(rows: npt.NDArray[np.floating]) -> _Floats:
    rows = rows.astype(np.float32)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(length > 0, length, 1)).astype(np.float32)


def _distances(rows: _Floats, one: _Floats) -> _Floats:
    found: _Floats = np.clip(1 - rows @ one, 0, 2)
    # The same picture again is at distance zero, whatever rounding says.
    found[found < 1e-5] = 0
    return found


def _to_nearest(rows: _Floats, others: _Floats) -> _Floats:
    found = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _ROWS):
        found[start : start + _ROWS] = np.clip(1 - (rows[start : start + _ROWS] @ others.T).max(axis=1), 0, 2)
    found[found < 1e-5] = 0
    return found


def _usual(known: _Floats) -> float:
    """Median cosine distance of a known picture to its nearest other one; 0 for a single one."""
    sample = known[: 4 * _ROWS]
    if len(sample) < 2:
        return 0.0
    nearest = np.empty(len(sample), np.float32)
    for start in range(0, len(sample), _ROWS):
        likeness = sample[start : start + _ROWS] @ sample.T
        likeness[np.arange(len(likeness)), start + np.arange(len(likeness))] = -np.inf
        nearest[start : start + _ROWS] = 1 - likeness.max(axis=1)
    return float(np.median(np.clip(nearest, 0, 2)))
