"""Which pictures may be copies of each other, told from small thumbnails alone: cropped and mirrored copies included.

Of every picture the signs of low frequencies are a code of a few bits: the perceptual hash. The codes of whole pictures are
a table; every picture asks it for the codes of parts of itself, mirrored too, so that a crop finds the picture it was cut
from. As a sign is unsure where its frequency is weak, the weakest ones are asked for both ways. The cost grows with the
number of pictures, not with its square, and no two pictures that are alike in nothing are ever compared.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from components.contracts.progress import Progress, silent

SIDE = 32
"""Pixels a side of a thumbnail."""
_FREQUENCIES = 8
_BITS = 24
_PROBED_BITS = 5
_CUTS = (
    (0.0, 0.0),
    (0.05, 0.0),
    (0.0, 0.05),
    (0.1, 0.0),
    (0.05, 0.05),
    (0.0, 0.1),
    (0.15, 0.0),
    (0.075, 0.075),
    (0.0, 0.15),
)
"""What is cut off at either end of a side, in shares of it."""
_LEAST_CORRELATION = 0.9
_CHUNK = 512

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in shares of the picture."""


@dataclass(frozen=True)
class Candidate:
    """The picture of row `part` may be what `box` holds of the picture of row `whole`, mirrored or not."""

    whole: int
    part: int
    box: Box
    mirrored: bool
    correlation: float
    """Of their low frequencies, in [-1, 1]."""


def candidates(thumbnails: npt.NDArray[np.uint8], *, progress: Progress = silent) -> Iterator[Candidate]:
    """Pairs of rows of thumbnails (n, SIDE, SIDE) that may show one picture; each pair once as it is and once mirrored.

    Pictures of one colour have nothing to be told by and are left out.
    """
    count = len(thumbnails)
    whole = _views(thumbnails, _basis(((0.0, 0.0),)))[:, 0]
    codes = _codes(whole)
    order = np.argsort(codes, kind="stable").astype(np.int32)
    present = np.zeros(1 << _BITS, dtype=bool)
    present[codes] = True
    in_order = codes[order]
    probes = _probes()
    best: dict[tuple[int, int, bool], Candidate] = {}
    for start in range(0, count, _CHUNK):
        views = _views(thumbnails[start : start + _CHUNK], _basis(_CUTS))
        for mirrored in (False, True):
            seen = views * _MIRROR if mirrored else views
            rows, cuts, parts, correlations = _hits(seen, start, whole, present, in_order, order, probes)
            for row, cut, part, correlation in zip(
                rows.tolist(), cuts.tolist(), parts.tolist(), correlations.tolist(), strict=True
            ):
                key = min(row, part), max(row, part), mirrored
                known = best.get(key)
                if known is None or known.correlation < correlation:
                    best[key] = Candidate(row, part, _box(cut), mirrored, correlation)
        progress(min(count, start + _CHUNK), count)
    yield from (best[key] for key in sorted(best))


def _box(cut: int) -> Box:
    rows, columns = divmod(cut, len(_CUTS))
    return _CUTS[columns][0], _CUTS[rows][0], 1 - _CUTS[columns][1], 1 - _CUTS[rows][1]


def _hits(
    views: npt.NDArray[np.float32],
    start: int,
    whole: npt.NDArray[np.float32],
    present: npt.NDArray[np.bool_],
    in_order: npt.NDArray[np.int32],
    order: npt.NDArray[np.int32],
    probes: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Rows, cuts, the rows of what they may contain and the correlation, for views (n, cuts, d) of the rows from `start`."""
    flat = views.reshape(-1, views.shape[-1])
    told = np.abs(flat[:, _CODED])
    weakest = np.argpartition(told, _PROBED_BITS, axis=1)[:, :_PROBED_BITS]
    masks = (np.int32(1) << weakest.astype(np.int32)) @ probes.astype(np.int32)
    asked = _codes(flat)[:, None] ^ masks
    which, _ = np.nonzero(present[asked])
    wanted = asked[present[asked]]
    first, last = np.searchsorted(in_order, wanted, "left"), np.searchsorted(in_order, wanted, "right")
    lengths = last - first
    view = np.repeat(which, lengths)
    offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    part = order[np.repeat(first, lengths) + offsets].astype(np.int64)
    row, cut = start + view // views.shape[1], view % views.shape[1]
    other = row != part
    row, cut, part, view = row[other], cut[other], part[other], view[other]
    correlation = np.einsum("nd,nd->n", flat[view], whole[part])
    alike = correlation >= _LEAST_CORRELATION
    return row[alike], cut[alike], part[alike], correlation[alike]


def _views(thumbnails: npt.NDArray[np.uint8], basis: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Low frequencies (n, cuts * cuts, d) of parts of thumbnails, without the mean, of length 1; rows by columns of cuts."""
    cuts = len(basis)
    flat = basis.reshape(-1, SIDE)
    found = (flat @ thumbnails.astype(np.float32)) @ flat.T
    found = found.reshape(-1, cuts, _FREQUENCIES, cuts, _FREQUENCIES).transpose(0, 1, 3, 2, 4)
    vectors: npt.NDArray[np.float32] = found.reshape(len(thumbnails), cuts * cuts, _FREQUENCIES**2)[:, :, 1:].copy()
    vectors /= np.maximum(np.linalg.norm(vectors, axis=2, keepdims=True), 1e-6)
    return vectors


@functools.cache
def _basis(cuts: tuple[tuple[float, float], ...]) -> npt.NDArray[np.float32]:
    """Cosines (cuts, frequencies, SIDE) over what each cut leaves of a side."""
    rows = []
    edges = np.arange(SIDE + 1) / SIDE
    for before, after in cuts:
        left, right = np.clip(edges[:-1], before, 1 - after), np.clip(edges[1:], before, 1 - after)
        share = (right - left) / (1 - before - after)
        middle = ((left + right) / 2 - before) / (1 - before - after)
        cosines = np.cos(np.pi * np.arange(_FREQUENCIES)[:, None] * middle) * share
        cosines[1:] *= np.sqrt(2)
        rows.append(cosines)
    return np.array(rows, dtype=np.float32)


_GRID = [(v, u) for v in range(_FREQUENCIES) for u in range(_FREQUENCIES)][1:]
"""Vertical and horizontal frequency of each number of a vector."""
_CODED = np.array(sorted(range(len(_GRID)), key=lambda i: (_GRID[i][0] ** 2 + _GRID[i][1] ** 2, _GRID[i]))[:_BITS])
_MIRROR = np.array([-1 if u % 2 else 1 for _, u in _GRID], dtype=np.float32)


def _codes(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    codes: npt.NDArray[np.int32] = (vectors[:, _CODED] > 0).astype(np.int32) @ (1 << np.arange(_BITS, dtype=np.int32))
    return codes


@functools.cache
def _probes() -> npt.NDArray[np.bool_]:
    """All ways (bits, ways) to turn some of the probed bits."""
    return np.array(list(itertools.product((False, True), repeat=_PROBED_BITS))).T
