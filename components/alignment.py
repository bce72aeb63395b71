"""Whether two pictures show the same pixels once one is laid on the other: the judge of every near-duplicate.

Two pictures may look the same from afar and yet be two: parts on one inspection line, photographs of one burst. What they
do not share is the fine structure: noise, scratches, what moved in between. So one picture is laid on the other, and they
are copies only if what is fine agrees everywhere where there is any. A copy with something drawn on it is none.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from components.candidates import Box

_LONGEST = 256
"""Pixels of the longer side at which pictures are compared at last; less where one of them is smaller."""
_COARSER = (24, 64)
"""The same while the one is laid on the other."""
_STEPS, _CLOSE_PIXELS = 8, 0.02
"""Most steps of moving an edge, and a step that ends it."""
_TILES, _TILE_PIXELS = 6, 9
"""Tiles a side, and the least pixels a side of one."""
_LEAST_PIXELS = 12
"""Pixels of the shorter side under which a smaller copy of a picture tells nothing."""
_LEAST_AGREEMENT, _LEAST_TILE = 0.85, 0.2
_LEAST_OF_FEW, _MOST_TILES = 0.93, 0.75
"""The agreement of pictures that are plain in more than a quarter of their tiles: outlines alone are soon alike."""
_LEAST_OF_DRAWN, _FEWEST_TILES = 0.985, 0.35
"""The agreement of what is drawn in black and white, and tells in hardly any tile: two sevens by one hand are not one."""
_TELLING = 64
_DIFFERENT_AGREEMENT, _DIFFERENT_TILE = 0.3, -0.1
"""What has less than this at this many pixels is another picture."""
_NOISE = 1.0
"""Fine structure of fewer grey levels is what rounding leaves."""
_PLAIN = 5.0
"""Fine structure of so many grey levels is not lost by storing a picture badly."""
_CLIPPED = (8, 247)
"""Grey levels beyond which brightening may have taken what was there."""

_Pixels = npt.NDArray[np.float32]
_Edges = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Grey:
    """A picture as it is compared: in grey, and no larger than that takes."""

    image: Image.Image
    width: int
    height: int
    """Of the picture itself."""


@dataclass(frozen=True)
class Alignment:
    """How the one picture lies in the other, and how well they agree."""

    box: Box
    """What of the first picture the second shows, in shares."""
    agreement: float
    """Correlation of the fine structure, in [-1, 1]."""
    worst: float
    """The same of the tile where they agree least, among those that hold any fine structure."""
    told: float
    """The share of tiles that hold any."""
    contrast: float
    """How much more contrast the second has than the first."""
    brightness: float
    """How many grey levels it is lighter, beside that."""

    @property
    def same(self) -> bool:
        """Whether the two are one picture."""
        least = _LEAST_AGREEMENT if self.told >= _MOST_TILES else _LEAST_OF_FEW
        least = least if self.told >= _FEWEST_TILES else _LEAST_OF_DRAWN
        return self.agreement >= least and self.worst >= _LEAST_TILE


def grey(image: Image.Image) -> Grey:
    """A picture as `align` takes it."""
    return Grey(_reduced(image, max(image.size), 2 * _LONGEST), image.width, image.height)


def align(first: Grey, second: Grey, *, box: Box, mirrored: bool) -> Alignment:
    """Lay the second picture on what `box` (shares) holds of the first, mirrored first if told, and compare.

    What disagrees when it is seen coarsely is not looked at more closely.
    """
    one, two = first.image, ImageOps.mirror(second.image) if mirrored else second.image
    size = np.array([one.width, one.height] * 2, dtype=np.float64)
    edges = np.array(box) * size
    share = max((box[2] - box[0]) * first.width, (box[3] - box[1]) * first.height)
    longest = max(8, min(_LONGEST, max(second.width, second.height), round(share)))
    for level in (*(level for level in _COARSER if level < 0.8 * longest), longest):
        scale = level / max(second.width, second.height)
        shape = max(8, round(second.width * scale)), max(8, round(second.height * scale))
        here = _reduced(one, max(edges[2] - edges[0], edges[3] - edges[1]), level)
        times = np.array([here.width / one.width, here.height / one.height] * 2)
        target = _resized(two, shape, None)
        edges = _improved(here, edges * times, target, shape) / times
        seen = _resized(here, shape, edges * times)
        found = _compared(seen, target, edges / size)
        if level >= _TELLING and (found.agreement < _DIFFERENT_AGREEMENT or found.worst < _DIFFERENT_TILE):
            break
    return found


def _reduced(image: Image.Image, extent: float, longest: int) -> Image.Image:
    """Grey, and smaller by a whole number as long as `extent` pixels of it stay twice as many as will be looked at."""
    factor = int(extent // (2 * longest))
    return (image.reduce(factor) if factor > 1 else image).convert("L")


def _resized(image: Image.Image, shape: tuple[int, int], edges: _Edges | None) -> _Pixels:
    box = None if edges is None else (edges[0], edges[1], edges[2], edges[3])
    return np.asarray(image.resize(shape, Image.Resampling.BILINEAR, box=box), dtype=np.float32)


def _improved(image: Image.Image, edges: _Edges, target: _Pixels, shape: tuple[int, int]) -> _Edges:
    """The edges moved towards least squares, by Gauss-Newton, brightness and contrast left free."""
    x = ((np.arange(shape[0]) + 0.5) / shape[0])[None, :]
    y = ((np.arange(shape[1]) + 0.5) / shape[1])[:, None]
    limits = np.array([image.width, image.height] * 2)
    for _ in range(_STEPS):
        seen = _resized(image, shape, edges)
        down, across = np.gradient(seen)
        columns = [seen, np.ones_like(seen), across * (1 - x), down * (1 - y), across * x, down * y]
        system = np.stack([column.ravel() for column in columns]).astype(np.float32)
        normal = (system @ system.T).astype(np.float64)
        normal[np.diag_indices(6)] += 1e-6 * np.trace(normal) / 6
        solved = np.linalg.solve(normal, (system @ target.ravel()).astype(np.float64))
        if solved[0] <= 0.1:
            break
        extent = np.array([edges[2] - edges[0], edges[3] - edges[1]] * 2)
        pixels = solved[2:] / solved[0]
        step = np.clip(pixels * extent / np.array(shape * 2), -0.1 * extent, 0.1 * extent)
        moved: _Edges = np.clip(edges + step, 0, limits)
        if (moved[2:] - moved[:2] < 0.4 * extent[:2]).any():
            break
        edges = moved
        if np.abs(pixels).max() < _CLOSE_PIXELS:
            break
    return edges


def _compared(first: _Pixels, second: _Pixels, box: _Edges) -> Alignment:
    """Correlation of fine structure, over all and in the tile where it is least; the best of this size and smaller ones.

    Storing a picture badly takes the finest noise away and leaves what is a little coarser.
    """
    sizes = [(first, second), (_halved(first), _halved(second)), (_halved(_halved(first)), _halved(_halved(second)))]
    bands = [(_fine(one), _fine(two)) for one, two in sizes if min(one.shape) >= _LEAST_PIXELS]
    bands = bands or [(_fine(first), _fine(second))]
    tiles = [max(1, min(_TILES, round(side / _TILE_PIXELS))) for side in first.shape]
    lit = (_CLIPPED[0] < first) & (first < _CLIPPED[1]) & (_CLIPPED[0] < second) & (second < _CLIPPED[1])
    tiled = [_tiles(*band, seen, tiles) for band, seen in zip(bands[:2], (lit, _halved(lit) == 1), strict=False)]
    told = [max(found) for found in zip(*tiled, strict=True) if max(found) > -1]
    # Coarsely, as noise that is gone from one of them is no contrast.
    one, two = sizes[-1]
    contrast = float(((one - one.mean()) * (two - two.mean())).mean() / max(1e-6, float(one.var())))
    left, top, right, bottom = box.tolist()
    return Alignment(
        box=(left, top, right, bottom),
        agreement=max(_correlation(*band) for band in bands),
        worst=min(told, default=1.0),
        told=len(told) / (tiles[0] * tiles[1]),
        contrast=contrast,
        brightness=float(second.mean() - first.mean()),
    )


def _halved(grey: npt.NDArray[Any]) -> _Pixels:
    height, width = grey.shape[0] // 2, grey.shape[1] // 2
    halved: _Pixels = grey[: 2 * height, : 2 * width].reshape(height, 2, width, 2).mean(axis=(1, 3), dtype=np.float32)
    return halved


def _fine(grey: _Pixels) -> _Pixels:
    """What a blur of about a pixel takes away."""
    blurred = grey
    for axis in (0, 1):
        padded = np.pad(blurred, [(2, 2) if a == axis else (0, 0) for a in (0, 1)], mode="reflect")
        size = blurred.shape[axis]
        parts = [np.take(padded, range(i, i + size), axis=axis) for i in range(5)]
        weighted = parts[0] + 4 * parts[1] + 6 * parts[2] + 4 * parts[3] + parts[4]
        blurred = (weighted / 16).astype(np.float32)
    return grey - blurred


def _tiles(first: _Pixels, second: _Pixels, lit: npt.NDArray[np.bool_], tiles: list[int]) -> list[float]:
    """Correlation in each tile; below -1 where there is no fine structure, or it is too dark or too light to be told."""
    down = itertools.pairwise(np.linspace(0, first.shape[0], tiles[0] + 1).astype(int).tolist())
    across = itertools.pairwise(np.linspace(0, first.shape[1], tiles[1] + 1).astype(int).tolist())
    found = []
    for (top, bottom), (left, right) in itertools.product(down, across):
        here = slice(top, bottom), slice(left, right)
        one, two = first[here], second[here]
        weaker, stronger = sorted((float(one.std()), float(two.std())))
        told = (weaker > _NOISE or stronger > _PLAIN) and lit[here].mean() > 0.5
        found.append(_correlation(one, two) if told else -2.0)
    return found


def _correlation(first: _Pixels, second: _Pixels) -> float:
    return float((first * second).sum() / max(1e-6, float(np.sqrt((first**2).sum() * (second**2).sum()))))
