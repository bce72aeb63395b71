"""Whether two pictures show the same pixels once one is laid on the other: the judge of every near-duplicate.

Two pictures may look the same from afar and yet be two: parts on one inspection line, photographs of one burst. What they
do not share is the fine structure: noise, scratches, what moved in between. So one picture is laid on the other, and they
are copies only if what is fine agrees everywhere where there is any. A copy with something drawn on it is none.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from components.candidates import Box

_LONGEST = 256
"""Pixels of the longer side at which pictures are compared at last; less where one of them is smaller."""
_COARSER = (24, 64)
"""The same while the one is laid on the other."""
_STEPS = 6
_TILES, _TILE_PIXELS = 6, 9
"""Tiles a side, and the least pixels a side of one."""
_LEAST_AGREEMENT = 0.5
_LEAST_TILE = 0.2
_NOISE = 1.0
"""Fine structure of fewer grey levels is what rounding leaves."""

Grey = npt.NDArray[np.float32]
_Edges = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Alignment:
    """How the one picture lies in the other, and how well they agree."""

    box: Box
    """What of the first picture the second shows, in shares."""
    agreement: float
    """Correlation of the fine structure, in [-1, 1]."""
    worst: float
    """The same of the tile where they agree least, among those that hold any fine structure."""

    @property
    def same(self) -> bool:
        """Whether the two are one picture."""
        return self.agreement >= _LEAST_AGREEMENT and self.worst >= _LEAST_TILE


def align(first: Image.Image, second: Image.Image, *, box: Box, mirrored: bool) -> Alignment:
    """Lay the second picture on what `box` (shares) holds of the first, mirrored first if told, and compare."""
    seen, target, found = laid(first, second, box=box, mirrored=mirrored)
    return Alignment(found, *_agreement(seen, target))


def laid(first: Image.Image, second: Image.Image, *, box: Box, mirrored: bool) -> tuple[Grey, Grey, Box]:
    """What of the first picture the second shows, and the second, at one size; and the box that was found (shares)."""
    size = np.array([first.width, first.height] * 2, dtype=np.float64)
    edges = np.array(box) * size
    longest = min(_LONGEST, max(second.size), round(max(edges[2] - edges[0], edges[3] - edges[1])))
    one, two = _reduced(first, edges, longest), _reduced(second, None, longest)
    two = ImageOps.mirror(two) if mirrored else two
    edges *= np.array([one.width, one.height] * 2) / size
    for level in (*(level for level in _COARSER if level < 0.8 * longest), longest):
        shape = max(8, round(second.width * level / max(second.size))), max(8, round(second.height * level / max(second.size)))
        here = _reduced(one, edges, level)
        scale = np.array([here.width / one.width, here.height / one.height] * 2)
        target = _resized(two, shape, None)
        for _ in range(_STEPS):
            edges = _improved(here, edges * scale, target, shape) / scale
    left, top, right, bottom = (edges / np.array([one.width, one.height] * 2)).tolist()
    return _resized(one, shape, edges), target, (left, top, right, bottom)


def _reduced(image: Image.Image, edges: _Edges | None, longest: int) -> Image.Image:
    """Grey, and by whole numbers smaller as long as what is between the edges stays twice as long as it will be looked at."""
    extent = max(image.size) if edges is None else max(edges[2] - edges[0], edges[3] - edges[1])
    factor = int(extent // (2 * longest))
    reduced = image.reduce(factor) if factor > 1 else image
    return reduced.convert("L")


def _resized(image: Image.Image, shape: tuple[int, int], edges: _Edges | None) -> Grey:
    box = None if edges is None else (edges[0], edges[1], edges[2], edges[3])
    return np.asarray(image.resize(shape, Image.Resampling.BILINEAR, box=box), dtype=np.float32)


def _improved(image: Image.Image, edges: _Edges, target: Grey, shape: tuple[int, int]) -> _Edges:
    """One Gauss-Newton step of the edges towards least squares, brightness and contrast left free."""
    seen = _resized(image, shape, edges)
    down, across = np.gradient(seen)
    x = ((np.arange(shape[0]) + 0.5) / shape[0])[None, :]
    y = ((np.arange(shape[1]) + 0.5) / shape[1])[:, None]
    columns = [seen, np.ones_like(seen), across * (1 - x), down * (1 - y), across * x, down * y]
    system = np.stack([column.ravel() for column in columns], axis=1).astype(np.float64)
    normal = system.T @ system
    normal[np.diag_indices(6)] += 1e-6 * np.trace(normal) / 6
    solved = np.linalg.solve(normal, system.T @ target.ravel().astype(np.float64))
    if solved[0] <= 0.1:
        return edges
    extent = np.array([edges[2] - edges[0], edges[3] - edges[1]] * 2)
    step = solved[2:] / solved[0] * extent / np.array(shape * 2)
    limits = np.array([image.width, image.height] * 2)
    moved: _Edges = np.clip(edges + np.clip(step, -0.1 * extent, 0.1 * extent), 0, limits)
    if (moved[2:] - moved[:2] < 0.4 * extent[:2]).any():
        return edges
    return moved


def _agreement(first: Grey, second: Grey) -> tuple[float, float]:
    """Correlation of fine structure over all, and in the tile where it is least; at this size or at half of it.

    Storing a picture badly takes the finest noise away and leaves what is a little coarser.
    """
    bands = [(_fine(first), _fine(second)), (_fine(_halved(first)), _fine(_halved(second)))]
    tiles = [max(1, min(_TILES, round(side / _TILE_PIXELS))) for side in first.shape]
    tiled = [_tiles(one, two, tiles) for one, two in bands]
    told = [max(found) for found in zip(*tiled, strict=True) if max(found) > -1]
    return max(_correlation(one, two) for one, two in bands), min(told, default=1.0)


def _halved(grey: Grey) -> Grey:
    height, width = grey.shape[0] // 2, grey.shape[1] // 2
    halved: Grey = grey[: 2 * height, : 2 * width].reshape(height, 2, width, 2).mean(axis=(1, 3))
    return halved


def _fine(grey: Grey) -> Grey:
    """What a blur of about a pixel takes away."""
    blurred = grey
    for axis in (0, 1):
        padded = np.pad(blurred, [(2, 2) if a == axis else (0, 0) for a in (0, 1)], mode="reflect")
        size = blurred.shape[axis]
        parts = [np.take(padded, range(i, i + size), axis=axis) for i in range(5)]
        weighted = parts[0] + 4 * parts[1] + 6 * parts[2] + 4 * parts[3] + parts[4]
        blurred = (weighted / 16).astype(np.float32)
    return grey - blurred


def _tiles(first: Grey, second: Grey, tiles: list[int]) -> list[float]:
    """Correlation in each tile; below -1 where either holds no fine structure."""
    down = itertools.pairwise(np.linspace(0, first.shape[0], tiles[0] + 1).astype(int).tolist())
    across = itertools.pairwise(np.linspace(0, first.shape[1], tiles[1] + 1).astype(int).tolist())
    found = []
    for (top, bottom), (left, right) in itertools.product(down, across):
        one, two = first[top:bottom, left:right], second[top:bottom, left:right]
        found.append(_correlation(one, two) if min(one.std(), two.std()) > _NOISE else -2.0)
    return found


def _correlation(first: Grey, second: Grey) -> float:
    return float((first * second).sum() / max(1e-6, float(np.sqrt((first**2).sum() * (second**2).sum()))))
