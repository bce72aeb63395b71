"""Which images of a window would teach most if a person said what they show.

Uncertain ones, unlike the reference, and unlike each other.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from monitoring.verdicts import Sample
from monitoring.window import Window

if TYPE_CHECKING:
    import pandas as pd

_POOL = 2000


def most_useful(
    reference: Sample, window: Window, *, available: Collection[str], known: Collection[str], count: int
) -> pd.DataFrame:
    """At most `count` rows (prediction_id, image_sha256, predicted, confidence, novelty), the most useful first.

    Only images whose bytes were kept (`available`) and that nobody has labelled (`known`), each once. Uncertain and unlike
    the reference comes first; then each next one is the farthest from all that were chosen, so that fifty pictures of the
    same thing are not labelled fifty times (greedy k-centres, Sener, Savarese, "Active Learning for CNNs", 2018).
    """
    frame = window.frame.assign(row=np.arange(len(window.frame)))
    frame = frame[frame["image_sha256"].isin(available) & ~frame["image_sha256"].isin(known)]
    frame = frame.drop_duplicates("image_sha256").reset_index(drop=True)
    if not len(frame):
        return frame.assign(novelty=np.zeros(0)).drop(columns=["row"])
    points = _scaled(reference.embeddings, window.sample.embeddings[frame["row"].to_numpy()])
    novelty = _distance_to(points, _scaled(reference.embeddings, reference.embeddings))
    worth = _ranked(novelty) + _ranked(1 - frame["confidence"].to_numpy(dtype=np.float64))
    pool = np.argsort(-worth, kind="stable")[:_POOL]
    chosen = [int(pool[0])]
    nearest = np.linalg.norm(points[pool] - points[chosen[0]], axis=1)
    while len(chosen) < min(count, len(pool)):
        # How useful by itself, times how unlike what is chosen already.
        following = int(pool[int(np.argmax(nearest * (0.1 + worth[pool])))])
        if following in chosen:
            break
        chosen.append(following)
        nearest = np.minimum(nearest, np.linalg.norm(points[pool] - points[following], axis=1))
    return frame.assign(novelty=novelty).iloc[chosen].drop(columns=["row"]).reset_index(drop=True)


def _scaled(reference: npt.NDArray[np.float32], embeddings: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    deviation = reference.std(axis=0)
    found: npt.NDArray[np.float32] = ((embeddings - reference.mean(axis=0)) / np.maximum(deviation, 1e-3)).astype(np.float32)
    return found


def _distance_to(points: npt.NDArray[np.float32], others: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Distance of each point to the nearest of `others`."""
    found = np.empty(len(points))
    squares = (others**2).sum(axis=1)
    for start in range(0, len(points), 1000):
        part = points[start : start + 1000]
        distances = (part**2).sum(axis=1)[:, None] + squares[None, :] - 2 * part @ others.T
        found[start : start + 1000] = np.sqrt(np.maximum(distances.min(axis=1), 0))
    return found


def _ranked(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks in [0, 1], the largest value at 1."""
    from scipy.stats import rankdata

    found: npt.NDArray[np.float64] = rankdata(values) / len(values)
    return found
