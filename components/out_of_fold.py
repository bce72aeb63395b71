"""Out-of-fold probabilities: what a linear head on embeddings answers about each picture when it never saw that picture.

Two kinds of head are tried, on the square roots of the embeddings (Perronnin et al., "Improving the Fisher kernel", 2010),
and the one is kept to which the labels that were left out are likeliest. A ridge regression on the classes, in closed form:
what the folds share is summed once, so that k folds cost little more than one, and it is the better one where pictures are
few. Where they are many, a softmax regression whose loss knows that some labels are wrong. How much weights are held back,
the temperature of the answers, and the share of labels that are drawn at random and say nothing of the picture, are chosen
by the same likelihood. With that share the probabilities are about what a picture shows; without it, wrong labels would
make the head doubt all of its answers, and nothing would be a wrong label to it for certain.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
_TEMPERATURES = np.geomspace(0.02, 4.0, 47)
_RANDOM = (0.0, 0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4)
"""Shares of the labels."""
_BLOCK = 8192
_BATCH = 256
_EPOCHS = 6
_LEAST_STEPS = 300
_RATE = 0.07
"""Over the root of how many numbers an embedding has: so many steps of a rate move an answer by as much."""
_MOST_TO_DESCEND = 1 << 23
"""Of pictures and classes; a softmax regression on more of them takes minutes."""
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
    found, best = np.empty(0, dtype=np.float32), _Fitted(np.inf, 1.0, 0.0)
    roots = np.sign(embeddings) * np.sqrt(np.abs(embeddings))
    heads = _Heads(roots, targets, k, folds)
    for penalty in _PENALTIES:
        scores = heads.scores(penalty)
        if (fitted := _fitted(scores[asked], targets[asked])).loss < best.loss:
            found, best = scores, fitted
    # With hardly more pictures than numbers of each, a softmax regression knows all of them by heart.
    if n > 2 * embeddings.shape[1] and n * k <= _MOST_TO_DESCEND:
        scores = _descended(heads, targets, random=best.random, order=np.argsort(np.array(clusters), kind="stable"))
        if (fitted := _fitted(scores[asked], targets[asked])).loss < best.loss:
            found, best = scores, fitted
    found = _softmax(found, best.temperature)
    for fold in set(folds.tolist()):
        # A head that saw nothing of a class knows nothing against that label: it counts as right.
        unseen = np.flatnonzero((folds == fold) & ~np.isin(targets, targets[folds != fold]))
        found[unseen] = np.eye(k, dtype=np.float32)[targets[unseen]]
    return found


@dataclass(frozen=True)
class _Fitted:
    """The least mean log loss of left-out labels, and the temperature and the share of random labels that it takes."""

    loss: float
    temperature: float
    random: float


def _fitted(scores: Floats, targets: Numbers) -> _Fitted:
    best = _Fitted(np.inf, 1.0, 0.0)
    for temperature in _TEMPERATURES:
        given = _softmax(scores, temperature)[np.arange(len(targets)), targets].astype(np.float64)
        for share in _RANDOM:
            loss = _log_loss((1 - share) * given + share / scores.shape[1])
            if loss < best.loss:
                best = _Fitted(loss, float(temperature), share)
    return best


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

    @property
    def num_inputs(self) -> int:
        return len(self.mean) + 1

    def inputs(self, rows: Numbers) -> Floats:
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
            block = self.inputs(some)
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
                found[some] = self.inputs(some) @ head
        return found


def _descended(heads: _Heads, targets: Numbers, *, random: float, order: Numbers) -> Floats:
    """The answers (n, classes) to every row of a softmax regression that it was left out of.

    A label counts as right or, with the probability `random`, as any: what the head is sure is wrong hardly moves it. The
    rows are drawn from `order`, so that it is the pictures that decide and not how their table is sorted.
    """
    import torch

    found = np.empty((len(targets), heads.num_classes), dtype=np.float32)
    rate = _RATE / heads.num_inputs**0.5
    for members in heads.members:
        seen = order[~np.isin(order, members)]
        inputs, labels = torch.from_numpy(heads.inputs(seen)), torch.from_numpy(targets[seen])
        batch = min(_BATCH, len(seen))
        per_epoch = len(seen) // batch
        epochs = max(_EPOCHS, -(-_LEAST_STEPS // per_epoch))
        weights = torch.zeros((heads.num_inputs, heads.num_classes), requires_grad=True)
        optimizer = torch.optim.AdamW([weights], weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * per_epoch)
        drawn = np.random.default_rng(0)
        for _ in range(epochs):
            mixed = torch.from_numpy(drawn.permutation(len(seen)))
            for step in range(per_epoch):
                rows = mixed[step * batch : (step + 1) * batch]
                chances = (inputs[rows] @ weights).softmax(dim=1)
                own = chances.gather(1, labels[rows][:, None])
                loss = -((1 - random) * own + random / heads.num_classes).clamp_min(1e-12).log().mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
        head = weights.detach().numpy()
        for some in _blocks(members):
            found[some] = heads.inputs(some) @ head
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
