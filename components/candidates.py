"""Which pictures may be copies of each other, told from small thumbnails alone: cropped and mirrored copies included.

Of every picture the signs of low frequencies are a code of a few bits: a perceptual hash. The codes of whole pictures are
a table; every picture asks it for the codes of parts of itself, mirrored too, so that a crop finds the picture it was cut
from. As a sign is unsure where its frequency is weak, the weakest ones are asked for both ways. The cost grows with the
number of pictures and not with its square, also where many are alike: each asks for a bounded number of others.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from components.contracts.progress import Progress, silent
from components.images import in_threads

SIDE = 32
"""Pixels a side of a thumbnail."""
_BITS, _PROBED_BITS = 24, 5
_CODED_FREQUENCIES, _FREQUENCIES = 6, 8
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
_WIDE_CUTS = tuple((a, b) for a in (0.0, 0.06, 0.12, 0.2, 0.3) for b in (0.0, 0.06, 0.12, 0.2, 0.3) if a + b <= 0.35)
_LEAST_CORRELATION = 0.9
_MOST = 2000
"""Others whose thumbnails a picture's is compared with, as it is and again mirrored."""
_KEPT = 16
"""Those of them that are candidates: the ones most alike."""
_STEPS, _LEAST_SHARE = 5, 0.4
"""Steps in which a box is moved, and the least share of a side that it leaves."""
_LEAST_AGREEMENT = 0.75
_LEAST_OF_DRAWN, _LEAST_SHADED = 0.92, 0.35
"""The agreement of thumbnails of which less than this share is neither black nor white: drawings are soon alike."""
_BLACK, _WHITE = 8, 247
_PLACES = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE
_CHUNK = 256

_Cuts = tuple[tuple[float, float], ...]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in shares of the picture."""
_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]


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

    Thumbnails of one colour have nothing to be told by and should be left out.
    """
    table = _Table(thumbnails)
    best: dict[tuple[int, int, bool], Candidate] = {}
    starts = range(0, len(thumbnails), _CHUNK)
    for found in in_threads(table.asked, starts, progress=progress):
        for whole, part, cut, mirrored, correlation in found:
            key = min(whole, part), max(whole, part), mirrored
            known = best.get(key)
            if known is None or known.correlation < correlation:
                best[key] = Candidate(whole, part, _box(_CUTS, cut), mirrored, correlation)
    yield from (best[key] for key in sorted(best))


def matched(
    thumbnails: npt.NDArray[np.uint8], first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]
) -> list[Candidate]:
    """Of pairs of rows that something else says may be alike, how they most likely lie in each other, where they can.

    More may be cut off than `candidates` looks for, up to a third of a side.
    """
    found: list[Candidate] = []
    for start in range(0, len(first), _CHUNK):
        one, two = first[start : start + _CHUNK], second[start : start + _CHUNK]
        in_one, in_two = _wide_views(thumbnails[one]), _wide_views(thumbnails[two])
        for whole, part, these, those in ((one, two, in_one, in_two), (two, one, in_two, in_one)):
            for mirrored in (False, True):
                target = those[:, 0] * _MIRROR if mirrored else those[:, 0]
                correlations = np.einsum("ncd,nd->nc", these, target)
                for row, cut in enumerate(correlations.argmax(axis=1).tolist()):
                    if (correlation := float(correlations[row, cut])) >= _LEAST_CORRELATION:
                        found.append(
                            Candidate(int(whole[row]), int(part[row]), _box(_WIDE_CUTS, cut), mirrored, correlation)
                        )
    return found


def refined(thumbnails: npt.NDArray[np.uint8], found: Sequence[Candidate]) -> list[Candidate]:
    """The candidates whose thumbnails agree once the one is laid on the other, and how they lie then.

    Gauss-Newton on the edges of the boxes, brightness and contrast left free, for many pairs at once.
    """
    kept: list[Candidate] = []
    for start in range(0, len(found), _CHUNK):
        chunk = found[start : start + _CHUNK]
        whole = thumbnails[[each.whole for each in chunk]].astype(np.float32)
        part = thumbnails[[each.part for each in chunk]].astype(np.float32)
        mirrored = np.array([each.mirrored for each in chunk])
        part[mirrored] = part[mirrored, :, ::-1]
        boxes = np.array([each.box for each in chunk], dtype=np.float32)
        for _ in range(_STEPS):
            boxes = _moved(whole, part, boxes)
        agreements = _agreements(_seen(whole, boxes), part)
        shaded = np.minimum(*(((side > _BLACK) & (side < _WHITE)).mean(axis=(1, 2)) for side in (whole, part)))
        enough = agreements >= np.where(shaded < _LEAST_SHADED, _LEAST_OF_DRAWN, _LEAST_AGREEMENT)
        for each, box, kept_one in zip(chunk, boxes.tolist(), enough.tolist(), strict=True):
            if kept_one:
                kept.append(dataclasses.replace(each, box=(box[0], box[1], box[2], box[3])))
    return kept


def _seen(whole: _Floats, boxes: _Floats) -> _Floats:
    """What boxes (n, 4) hold of thumbnails (n, SIDE, SIDE), at their size."""
    weights = []
    for first, last in ((boxes[:, 1], boxes[:, 3]), (boxes[:, 0], boxes[:, 2])):
        centres = (first[:, None] + _PLACES * (last - first)[:, None]) * SIDE - 0.5
        centres = np.clip(centres, 0, SIDE - 1)
        weights.append(np.maximum(0, 1 - np.abs(centres[:, :, None] - np.arange(SIDE, dtype=np.float32))))
    down, across = weights
    seen: _Floats = down @ whole @ across.transpose(0, 2, 1)
    return seen


def _moved(whole: _Floats, part: _Floats, boxes: _Floats) -> _Floats:
    """Boxes after one step towards least squares."""
    seen = _seen(whole, boxes)
    down, across = np.gradient(seen, axis=(1, 2))
    x, y = _PLACES[None, None, :], _PLACES[None, :, None]
    columns = [seen, np.ones_like(seen), across * (1 - x), down * (1 - y), across * x, down * y]
    system = np.stack(columns, axis=1).reshape(len(seen), 6, -1)
    normal = system @ system.transpose(0, 2, 1)
    normal += np.eye(6, dtype=np.float32) * (1e-5 * np.trace(normal, axis1=1, axis2=2) / 6 + 1e-3)[:, None, None]
    solved = np.linalg.solve(normal, system @ part.reshape(len(part), -1, 1))[:, :, 0]
    extent = np.concatenate([boxes[:, 2:] - boxes[:, :2]] * 2, axis=1)
    step = solved[:, 2:] / np.maximum(solved[:, :1], 0.2) / SIDE * extent
    moved = np.clip(boxes + np.clip(step, -0.06, 0.06), 0, 1)
    small = (moved[:, 2:] - moved[:, :2]).min(axis=1) < _LEAST_SHARE
    moved[small] = boxes[small]
    found: npt.NDArray[np.float32] = moved.astype(np.float32)
    return found


def _agreements(seen: _Floats, part: _Floats) -> _Floats:
    """Correlation (n,) of what neighbouring places differ by, at half the size: made small again, less is left than that."""
    steps = []
    for pixels in (seen, part):
        half = pixels.reshape(len(pixels), SIDE // 2, 2, SIDE // 2, 2).mean(axis=(2, 4))
        both = [np.diff(half, axis=axis).reshape(len(half), -1) for axis in (1, 2)]
        steps.append(np.concatenate(both, axis=1))
    lengths = np.linalg.norm(steps[0], axis=1) * np.linalg.norm(steps[1], axis=1)
    found: _Floats = (steps[0] * steps[1]).sum(axis=1) / np.maximum(lengths, 1e-6)
    return found


def _wide_views(thumbnails: npt.NDArray[np.uint8]) -> _Floats:
    seen = _frequencies(thumbnails, _basis(_WIDE_CUTS, _FREQUENCIES))
    return _normalised(seen.reshape(-1, _FREQUENCIES**2)).reshape(seen.shape)


class _Table:
    """The pictures by the code of the whole of each."""

    def __init__(self, thumbnails: npt.NDArray[np.uint8]) -> None:
        self._thumbnails = thumbnails
        whole = _frequencies(thumbnails, _basis(_CUTS[:1], _FREQUENCIES))[:, 0]
        self._whole = _normalised(whole)
        codes = _codes(_coded(whole))
        self._order = np.argsort(codes, kind="stable")
        self._codes = codes[self._order]
        self._present = np.zeros(1 << _BITS, dtype=bool)
        self._present[codes] = True

    def asked(self, start: int) -> list[tuple[int, int, int, bool, float]]:
        """Whole, part, cut, mirrored, correlation of what the pictures of rows from `start` may contain."""
        thumbnails = self._thumbnails[start : start + _CHUNK]
        coded = _coded(_frequencies(thumbnails, _basis(_CUTS, _CODED_FREQUENCIES))).reshape(-1, _BITS)
        weakest = np.argpartition(np.abs(coded), _PROBED_BITS, axis=1)[:, :_PROBED_BITS]
        ways = (1 << weakest) @ _probes()
        codes = _codes(coded)[:, None] ^ ways
        found: list[tuple[int, int, int, bool, float]] = []
        for mirrored in (False, True):
            view, position = self._hits(codes ^ _MIRRORED_CODE if mirrored else codes, len(thumbnails))
            row, cut = np.divmod(view, len(_CUTS) ** 2)
            part = self._order[position]
            other = part != row + start
            row, cut, part = row[other], cut[other], part[other]
            correlation = self._correlation(thumbnails, row, cut, part, mirrored)
            alike = _most_alike(row, part, correlation)
            found += zip(
                (row[alike] + start).tolist(),
                part[alike].tolist(),
                cut[alike].tolist(),
                itertools.repeat(mirrored),
                correlation[alike].tolist(),
                strict=False,
            )
        return found

    def _hits(self, codes: _Ints, rows: int) -> tuple[_Ints, _Ints]:
        """Views that ask and the positions that they hit, for the codes (views, ways); at most so many hits a row."""
        view, way = np.nonzero(self._present[codes])
        wanted = codes[view, way]
        first = np.searchsorted(self._codes, wanted, "left")
        lengths = np.searchsorted(self._codes, wanted, "right") - first
        row = view // (len(codes) // rows)
        before = np.cumsum(lengths) - lengths
        begins = np.searchsorted(row, np.arange(rows), "left")
        in_row = before - np.append(before, 0)[begins][row]
        lengths = np.clip(_MOST - in_row, 0, lengths)
        position = np.repeat(first - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        return np.repeat(view, lengths), position

    def _correlation(
        self, thumbnails: npt.NDArray[np.uint8], row: _Ints, cut: _Ints, part: _Ints, mirrored: bool
    ) -> _Floats:
        """Of low frequencies of what cuts leave of rows, with those of whole pictures."""
        found = np.zeros(len(row), dtype=np.float32)
        basis = _basis(_CUTS, _FREQUENCIES)
        for each in np.unique(cut):
            here = cut == each
            rows, which = np.unique(row[here], return_inverse=True)
            down, across = divmod(int(each), len(_CUTS))
            seen = _normalised((basis[down] @ thumbnails[rows].astype(np.float32) @ basis[across].T).reshape(len(rows), -1))
            seen = seen * _MIRROR if mirrored else seen
            found[here] = np.einsum("nd,nd->n", seen[which], self._whole[part[here]])
        return found


def _most_alike(row: _Ints, part: _Ints, correlation: _Floats) -> _Ints:
    """Which hits to keep: of each row's those most alike, each part once."""
    alike = np.flatnonzero(correlation >= _LEAST_CORRELATION)
    order = alike[np.lexsort((-correlation[alike], part[alike], row[alike]))]
    again = (np.diff(row[order]) == 0) & (np.diff(part[order]) == 0)
    order = order[np.insert(~again, 0, True)] if len(order) else order
    order = order[np.lexsort((-correlation[order], row[order]))]
    rank = np.arange(len(order)) - np.searchsorted(row[order], row[order], "left")
    return order[rank < _KEPT]


def _box(cuts: _Cuts, cut: int) -> Box:
    down, across = divmod(cut, len(cuts))
    return cuts[across][0], cuts[down][0], 1 - cuts[across][1], 1 - cuts[down][1]


def _frequencies(thumbnails: npt.NDArray[np.uint8], basis: _Floats) -> _Floats:
    """Low frequencies (n, cuts * cuts, frequencies * frequencies) of what cuts leave, rows by columns of cuts."""
    cuts, frequencies, _ = basis.shape
    flat = basis.reshape(-1, SIDE)
    found = (flat @ thumbnails.astype(np.float32)) @ flat.T
    found = found.reshape(len(thumbnails), cuts, frequencies, cuts, frequencies).transpose(0, 1, 3, 2, 4)
    return found.reshape(len(thumbnails), cuts * cuts, frequencies**2)


def _normalised(vectors: _Floats) -> _Floats:
    """Without the mean, of length 1."""
    vectors = vectors.copy()
    vectors[:, 0] = 0
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    return vectors


@functools.cache
def _basis(cuts: _Cuts, frequencies: int) -> _Floats:
    """Cosines (cuts, frequencies, SIDE) over what each cut leaves of a side."""
    rows = []
    edges = np.arange(SIDE + 1) / SIDE
    for before, after in cuts:
        left, right = np.clip(edges[:-1], before, 1 - after), np.clip(edges[1:], before, 1 - after)
        share = (right - left) / (1 - before - after)
        middle = ((left + right) / 2 - before) / (1 - before - after)
        cosines = np.cos(np.pi * np.arange(frequencies)[:, None] * middle) * share
        cosines[1:] *= np.sqrt(2)
        rows.append(cosines)
    return np.array(rows, dtype=np.float32)


_CODED = sorted(
    ((v, u) for v in range(_CODED_FREQUENCIES) for u in range(_CODED_FREQUENCIES)), key=lambda f: (f[0] ** 2 + f[1] ** 2, f)
)[1 : 1 + _BITS]
"""Vertical and horizontal frequency of each bit."""
_MIRRORED_CODE = sum(1 << bit for bit, (_, u) in enumerate(_CODED) if u % 2)
_MIRROR = np.tile(np.where(np.arange(_FREQUENCIES) % 2, -1, 1), _FREQUENCIES).astype(np.float32)


def _coded(frequencies: _Floats) -> _Floats:
    side = int(np.sqrt(frequencies.shape[-1]))
    return frequencies[..., [v * side + u for v, u in _CODED]]


def _codes(coded: _Floats) -> _Ints:
    codes: _Ints = (coded > 0) @ (1 << np.arange(_BITS))
    return codes


@functools.cache
def _probes() -> _Ints:
    """All ways (bits, ways) to turn some of the probed bits, none of them first."""
    return np.array(list(itertools.product((0, 1), repeat=_PROBED_BITS))).T
