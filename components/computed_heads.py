"""Heads that are computed in one step from a few pictures of each class, for which epochs could not be chosen.

`prototype` answers with the class whose mean embedding is nearest (Snell et al. 2017, who train the network below for it).
`linear` is ridge regression on the classes, whose strength is chosen. `auto` is class means, or the ridge where that does
better by more than a standard error. Each is one linear layer on the embedding, as any head, so engines, gates and serving
know no difference.

What is chosen, and how sure answers are, is told by leaving pictures out in turns, all views of a picture at once: what a
head answers about a picture that it was not computed from. Up to 200 pictures are left out one by one, more in 10 parts.
Every class counts alike, whatever its number of pictures. See infra/decisions/0034.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from components.contracts.errors import ConfigError
from components.contracts.families import Task

if TYPE_CHECKING:
    from torch import nn

HeadKind = Literal["prototype", "linear", "auto"]
Floats = npt.NDArray[np.float64]

MOST_ROWS = 2000
"""Pictures times views from which on a fit in steps takes less time."""
_ONE_BY_ONE, _PARTS = 200, 10
_STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Of the ridge, in units of the spread of the embeddings about their mean."""


@dataclass(frozen=True)
class Computed:
    """A head, and what heads like it answer about pictures that they were not computed from."""

    weight: Floats
    """(classes, embedding_dim)."""
    bias: Floats
    """(classes,)."""
    strength: float
    """Of the ridge; 0 for class means."""
    left_out: npt.NDArray[np.int64]
    """The pictures that were left out, by their place; of a class of one picture there is none."""
    answers: Floats
    """Logits about these, (left out, classes)."""

    def logits(self, embeddings: npt.NDArray[np.floating]) -> Floats:
        """(n, classes) of embeddings (n, embedding_dim)."""
        found: Floats = embeddings.astype(np.float64) @ self.weight.T + self.bias
        return found

    def put_into(self, head: nn.Module) -> None:
        """Give a task's head these weights; raises ConfigError where it is more than one linear layer."""
        import torch
        from torch import nn

        layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
        if len(layers) != 1 or tuple(layers[0].weight.shape) != self.weight.shape or layers[0].bias is None:
            raise ConfigError(
                f"a head that is computed is one linear layer of {self.weight.shape[0]} answers with a bias, and the head "
                f"of this task is another; leave `head` out of the phase, and it is fitted in steps"
            )
        with torch.no_grad():
            layers[0].weight.copy_(torch.from_numpy(self.weight))
            layers[0].bias.copy_(torch.from_numpy(self.bias))


def compute(
    views: Sequence[npt.NDArray[np.floating]], labels: npt.NDArray[np.int64], kind: HeadKind, task: Task
) -> Computed:
    """The head for embeddings (pictures, embedding_dim), an array a view, the picture as it is first.

    Raises ConfigError for a class without a picture, and for more pictures than it is made for.
    """
    num_classes = int(labels.max()) + 1
    counts = np.bincount(labels, minlength=num_classes)
    assert counts.all(), "splitting gives every class a picture"
    if len(labels) * len(views) > MOST_ROWS:
        raise ConfigError(
            f"{len(labels)} pictures in {len(views)} views are more than the {MOST_ROWS} rows that a head is computed from; "
            f"leave `head` out of the phase, and it is fitted in steps"
        )
    rows = np.concatenate([view.astype(np.float64) for view in views])
    owner = np.tile(np.arange(len(labels)), len(views))
    # About their mean, so that products keep their digits.
    centre = rows.mean(axis=0)
    gram = (rows - centre) @ (rows - centre).T
    chosen = _candidates(kind)
    left_out = np.flatnonzero(counts[labels] > 1)
    answers = {name: np.zeros((len(labels), num_classes)) for name in chosen}
    for part in _parts(left_out, labels):
        others = np.flatnonzero(~np.isin(owner, part))
        for name, found in _solved(gram, others, labels[owner], num_classes, chosen).items():
            # The view that nothing changed is first: a row of a picture is its place.
            answers[name][part] = gram[part] @ found.coefficients + found.offset
    losses = {name: _log_losses(found[left_out], labels[left_out], task) for name, found in answers.items()}
    best = _best(losses) if len(left_out) else chosen[0]
    found = _solved(gram, np.arange(len(rows)), labels[owner], num_classes, (best,))[best]
    weight = found.coefficients.T @ (rows - centre)
    bias = found.offset - weight @ centre
    unit = _unit(rows[: len(labels)] @ weight.T + bias)
    return Computed(weight / unit, bias / unit, best or 0.0, left_out, answers[best][left_out] / unit)


def _candidates(kind: HeadKind) -> tuple[float | None, ...]:
    """Strengths of the ridge, and None for prototypes."""
    return {"prototype": (None,), "linear": _STRENGTHS, "auto": (None, *_STRENGTHS)}[kind]


def _parts(pictures: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    """Pictures that are left out together; never all of a class."""
    if len(pictures) <= _ONE_BY_ONE:
        yield from (pictures[[place]] for place in range(len(pictures)))
        return
    # One after the other by class, dealt out in turns: a part has at most one more of a class than another one.
    dealt = pictures[np.argsort(labels[pictures], kind="stable")]
    yield from (dealt[start::_PARTS] for start in range(_PARTS))


@dataclass(frozen=True)
class _Solution:
    """Answers about a row are its products with all rows times `coefficients`, plus `offset`."""

    coefficients: Floats
    """(rows, classes)."""
    offset: Floats
    """(classes,)."""


def _solved(
    gram: Floats,
    chosen: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    num_classes: int,
    candidates: Sequence[float | None],
) -> dict[float | None, _Solution]:
    """Heads of the chosen rows, from the products of all rows."""
    mine = labels[chosen]
    targets = np.eye(num_classes)[mine]
    share = targets / np.bincount(mine, minlength=num_classes)
    # Every class weighs alike, and all rows together one.
    weights = share.sum(axis=1) / num_classes
    products = gram[np.ix_(chosen, chosen)]
    found: dict[float | None, _Solution] = {}
    if None in candidates:
        # |x - c|^2 / -2, without what is the same for all classes.
        lengths = np.einsum("ik,ij,jk->k", share, products, share, optimize=True)
        found[None] = _Solution(_spread(share, chosen, len(gram)), -lengths / 2)
    strengths = [each for each in candidates if each is not None]
    if strengths:
        mean = weights @ products
        level = float(mean @ weights)
        centred = products - mean[:, None] - mean[None, :] + level
        root = np.sqrt(weights)
        values, vectors = np.linalg.eigh(root[:, None] * centred * root[None, :])
        values = np.clip(values, 0.0, None)
        spread = float(values.sum()) or 1.0  # of equal pictures there is none
        turned = vectors.T @ (root[:, None] * (targets - 1 / num_classes))
        for strength in strengths:
            alpha = root[:, None] * (vectors @ (turned / (values + strength * spread)[:, None]))
            # The chosen rows are taken about their own mean: what that takes off each product.
            total = alpha.sum(axis=0)
            coefficients = alpha - weights[:, None] * total
            offset = 1 / num_classes - mean @ alpha + level * total
            found[strength] = _Solution(_spread(coefficients, chosen, len(gram)), offset)
    return found


def _spread(coefficients: Floats, chosen: npt.NDArray[np.int64], num_rows: int) -> Floats:
    found = np.zeros((num_rows, coefficients.shape[1]))
    found[chosen] = coefficients
    return found


def _unit(logits: Floats) -> float:
    """How far the best answer lies above the second, in the mean: what logits are divided by, so that it is one."""
    ranked = np.sort(logits, axis=1)
    found = float((ranked[:, -1] - ranked[:, -2]).mean())
    return found if np.isfinite(found) and found > 0 else 1.0


def _best(losses: Mapping[float | None, Floats]) -> float | None:
    """The head of the least mean loss; class means, of which nothing is chosen, unless it is less by a standard error."""
    best = min(losses, key=lambda name: float(losses[name].mean()))
    if None not in losses or best is None:
        return best
    gain = losses[None] - losses[best]
    error = float(gain.std(ddof=1)) / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
    return best if float(gain.mean()) > error else None


def _log_losses(logits: Floats, labels: npt.NDArray[np.int64], task: Task) -> Floats:
    """One a picture, of answers that are as sure as these pictures allow."""
    if not len(labels):
        return np.zeros(0)
    scaled = logits / _unit(logits)
    probabilities = task.probabilities(scaled, task.fit_temperature(scaled, labels))
    found: Floats = -np.log(np.clip(probabilities[np.arange(len(labels)), labels], 1e-300, None))
    return found
