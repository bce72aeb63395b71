"""Outliers: pictures that lie much farther from all others, in the space of embeddings, than is usual for their label.

The distance is that to the tenth nearest other picture, by cosine, so that a few copies of a strange picture do not hide
each other. What is usual is told by medians of its logarithm, and for each label by itself: a varied class is no row of
outliers. Of many pictures, neighbours are looked for among a sample of them.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import Known
from components.contracts.issues import Issue, Need

NAME = "outlier"
Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.float64]
Rows = npt.NDArray[np.intp]

_MOST_OTHERS = 4096
"""Neighbours are looked for among so many pictures: the time grows with the number of pictures, and not with its square."""
_FEWEST = 30
"""Of fewer pictures nobody can say what is usual among them."""
_BLOCK = 1024


class Finding(BaseModel):
    """The score is 1 / (1 + x) for a picture that is x times as far out as the limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_neighbours: int = Field(default=10, ge=1, le=100)
    deviations: float = Field(default=3.5, gt=0)
    """So many robust standard deviations above the median the limit lies, on a logarithmic scale."""

    @property
    def needs(self) -> frozenset[Need]:
        """Embeddings of the pictures."""
        return frozenset({"embeddings"})

    def look(self, known: Known) -> list[Issue]:
        """Every picture that is far from the others, the farthest first.

        A class of no more pictures than neighbours are asked for is far from all others by nature, and is not judged.
        """
        assert known.embeddings is not None
        table = known.table.reset_index(drop=True)
        # Copies of one picture are no neighbours of each other: a picture counts once.
        once = np.flatnonzero(~table.duplicated("picture").to_numpy())
        if len(once) < max(_FEWEST, 2 * self.num_neighbours):
            return []
        digests, labels = table["picture"].to_numpy(str), table["label"].to_numpy(str)
        pictures = digests[once].tolist()
        compute = functools.partial(_distances, known.embeddings, once, np.argsort(digests[once]), self.num_neighbours)
        distances = known.keep(NAME, str(self.num_neighbours), pictures, compute).astype(np.float64)
        usual, limits = self._limits(distances, labels[once])
        place = {picture: row for row, picture in enumerate(digests[once])}
        rows = np.array([place[picture] for picture in digests])
        excess = (distances / limits)[rows]
        common = (table.groupby("label")["label"].transform("size") > self.num_neighbours).to_numpy()
        found = [row for row in np.argsort(-excess, kind="stable") if excess[row] >= 1 and common[row]]
        return [
            known.issue(
                NAME,
                [table["path"].iloc[row]],
                severity="note",
                score=1 / (1 + excess[row]),
                threshold=0.5,
                detail=(
                    f"{(distances / usual)[rows[row]]:.2f} times as far from other pictures as is usual for {labels[row]}, "
                    f"limit {(limits / usual)[rows[row]]:.2f}"
                ),
                action=f"look whether it shows {labels[row]} and belongs to these data; remove it if not",
            )
            for row in found
        ]

    def _limits(self, distances: Numbers, labels: npt.NDArray[np.str_]) -> tuple[Numbers, Numbers]:
        """What distance is usual for each picture's label, and how far is too far."""
        logs = np.log(distances)
        usual, limits = np.empty(len(logs)), np.empty(len(logs))
        of_all = self._limit(logs)
        _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
        for rows in np.split(np.argsort(place, kind="stable"), np.cumsum(counts)[:-1]):
            usual[rows], limits[rows] = self._limit(logs[rows]) if len(rows) >= _FEWEST else of_all
        return usual, np.maximum(limits, usual * 1.05)

    def _limit(self, logs: Numbers) -> tuple[float, float]:
        middle = np.median(logs)
        # By the half above the median alone: how close others are says nothing about how far is far.
        spread = np.median(logs[logs >= middle] - middle) / 0.6745
        return float(np.exp(middle)), float(np.exp(middle + self.deviations * spread))


def _distances(embeddings: Floats, rows: Rows, order: Rows, num_neighbours: int) -> Floats:
    """Of each of these rows, the cosine distance to the last of its neighbours; `order` mixes the sample of these."""
    sample = order[np.linspace(0, len(order) - 1, min(len(order), _MOST_OTHERS)).astype(np.intp)]
    place = np.full(len(rows), -1)
    place[sample] = np.arange(len(sample))
    others = _unit(embeddings[rows[sample]]).T
    found = np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(rows), _BLOCK):
        stop = min(len(rows), start + _BLOCK)
        distances = 1 - _unit(embeddings[rows[start:stop]]) @ others
        own = place[start:stop]
        distances[np.flatnonzero(own >= 0), own[own >= 0]] = np.inf
        found[start:stop] = np.partition(distances, num_neighbours - 1, axis=1)[:, num_neighbours - 1]
    return np.maximum(found, np.float32(1e-6))


def _unit(embeddings: Floats) -> Floats:
    found: Floats = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    return found
