"""Out-of-fold probabilities: what a linear head on embeddings answers about each picture when it never saw that picture.

The head is a ridge regression on the classes, in closed form: what the folds share is summed once, so that k folds cost
little more than one, and a few wrong labels hardly move it. How much its weights are held back, the temperature of its
answers, and the share of labels that are drawn at random and say nothing of the picture, are those under which the labels
that were left out are likeliest. With that share the probabilities are about what a picture shows; without it, wrong labels
would make the head doubt all of its answers, and nothing would be a wrong label to it for certain.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from components.contracts.errors import DataError

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]

NUM_FOLDS = 5
MAX_PROBABILITIES = 1 << 26
"""Of pictures and classes; they are held several times at once."""
_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""On the squared weights of a picture's mean error, the embeddings having a variance of one."""
_TEMPERATURES = np.geomspace(0.02, 2.0, 41)
_RANDOM = (0.0, 0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4)
"""Shares of the labels."""
_BLOCK = 8192
_MOST_ASKED = 20_000
"""Of so many pictures it is asked how likely their labels are."""


def folds_of(clusters: Sequence[str], labels: Sequence[str], *, num_folds: int = NUM_FOLDS) -> Numbers:
    """The fold of each picture, all of a cluster in one, classes spread evenly; the same in any order of the pictures."""
    label_of: dict[str, str] = {}
    for cluster, label in zip(clusters, labels, strict=True):
        # A cluster of several classes is dealt out with the first of them.
        label_of[cluster] = min(label, label_of.get(cluster, label))
    dealt: Counter[str] = Counter()
    fold: dict[str, int] = {}
    for cluster in sorted(label_of, key=_drawn):
        label = label_of[cluster]
        # Every class begins at a fold of its own, so that small ones do not all fill the first.
        fold[cluster] = (_drawn(label)[0] + dealt[label]) % num_folds
        dealt[label] += 1
    return np.array([fold[cluster] for cluster in clusters], dtype=np.int64)


def _drawn(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def probabilities(
    embeddings: Floats, labels: Sequence[str], classes: Sequence[str], clusters: Sequence[str], *, num_folds: int = NUM_FOLDS
) -> Floats:
    """Probabilities (n, classes) for embeddings (n, d), each by a head that saw no picture of the same cluster.

    A label of which that head saw no picture at all has the probability 1.

    Raises DataError where there is nothing to learn from, or more of them than memory holds.
    """
    n, k = len(labels), len(classes)
    if n * k > MAX_PROBABILITIES:
        raise DataError(f"{n:,} pictures times {k:,} classes are more probabilities than the {MAX_PROBABILITIES:,} held")
    folds = folds_of(clusters, labels, num_folds=num_folds)
    if k < 2 or len(set(folds.tolist())) < 2:
        raise DataError("there are no pictures of two classes that differ from each other")
    place = {name: position for position, name in enumerate(classes)}
    targets = np.array([place[label] for label in labels], dtype=np.int64)
    asked = np.linspace(0, n - 1, min(n, _MOST_ASKED)).astype(np.int64)
    heads = _Heads(embeddings, targets, k, folds)
    best, lowest, temperature = np.empty(0, dtype=np.float32), np.inf, 1.0
    for penalty in _PENALTIES:
        scores = heads.scores(penalty)
        for each in _TEMPERATURES:
            given = _softmax(scores[asked], each)[np.arange(len(asked)), targets[asked]].astype(np.float64)
            loss = min(_log_loss((1 - share) * given + share / k) for share in _RANDOM)
            if loss < lowest:
                best, lowest, temperature = scores, loss, float(each)
    found = _softmax(best, temperature)
    for fold in set(folds.tolist()):
        # A head that saw nothing of a class knows nothing against that label: it counts as right.
        unseen = np.flatnonzero((folds == fold) & ~np.isin(targets, targets[folds != fold]))
        found[unseen] = np.eye(k, dtype=np.float32)[targets[unseen]]
    return found


class _Heads:
    """Ridge regressions from embeddings (n, d) to zeros and ones, one for each fold, which is left out of it."""

    def __init__(self, embeddings: Floats, targets: Numbers, num_classes: int, folds: Numbers) -> None:
        self.embeddings, self.num_classes = embeddings, num_classes
        self.mean = embeddings.mean(axis=0, dtype=np.float64).astype(np.float32)
        self.scale = np.float32(max(1e-12, float(embeddings.var(axis=0, dtype=np.float64).mean()) ** 0.5))
        self.members = [np.flatnonzero(folds == fold) for fold in sorted(set(folds.tolist()))]
        sums = [self._sums(rows, targets) for rows in self.members]
        squares, products = sum(square for square, _ in sums), sum(product for _, product in sums)
        self.without = [(squares - square, products - product) for square, product in sums]

    def _inputs(self, rows: Numbers) -> Floats:
        """Centred, of variance one over all of them, and a column of ones for the intercept; never of all rows at once."""
        found = np.ones((len(rows), self.embeddings.shape[1] + 1), dtype=np.float32)
        found[:, :-1] = (self.embeddings[rows] - self.mean) / self.scale
        return found

    def _sums(self, rows: Numbers, targets: Numbers) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The inputs' products with each other and with the targets, summed over these rows."""
        square = np.zeros((len(self.mean) + 1,) * 2)
        product = np.zeros((len(self.mean) + 1, self.num_classes))
        for some in _blocks(rows):
            some = some[np.argsort(targets[some], kind="stable")]
            block = self._inputs(some)
            square += block.T @ block
            there, begins = np.unique(targets[some], return_index=True)
            product[:, there] += np.add.reduceat(block, begins, axis=0, dtype=np.float64).T
        return square, product

    def scores(self, penalty: float) -> Floats:
        """The answers (n, classes) to every row of the head that it was left out of."""
        found = np.empty((len(self.embeddings), self.num_classes), dtype=np.float32)
        weights = np.arange(len(self.mean))  # all but the intercept
        for rows, (squares, products) in zip(self.members, self.without, strict=True):
            normal = squares.copy()
            normal[weights, weights] += penalty * (len(found) - len(rows))
            head = np.linalg.solve(normal, products).astype(np.float32)
            for some in _blocks(rows):
                found[some] = self._inputs(some) @ head
        return found


def _blocks(rows: Numbers) -> Iterator[Numbers]:
    for start in range(0, len(rows), _BLOCK):
        yield rows[start : start + _BLOCK]


def _softmax(scores: Floats, temperature: float) -> Floats:
    found: Floats = (scores - scores.max(axis=1, keepdims=True)) / np.float32(temperature)
    np.exp(found, out=found)
    found /= found.sum(axis=1, keepdims=True)
    return found


def _log_loss(given: npt.NDArray[np.float64]) -> float:
    return float(-np.log(np.maximum(given, 1e-12)).mean())
