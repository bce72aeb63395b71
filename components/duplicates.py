"""Near-duplicates: pictures that are copies of one another, stored anew, resized, cropped, mirrored or brightened.

Candidates are told by small descriptors that are computed once for each picture, and each of them is verified on the pixels
themselves. Likeness alone, of descriptors or of embeddings, never makes a pair. Pictures that were turned by an angle, and
crops that leave less than two thirds of a side, are not looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from components.alignment import Alignment, align
from components.candidates import SIDE, Candidate, candidates
from components.contracts.issues import Pair, Relation
from components.contracts.progress import Progress, silent
from components.images import Picture, in_threads

if TYPE_CHECKING:
    import pandas as pd

VERSION = 1
"""Of the descriptor; what was computed by another one is not comparable."""
SIZE = 4 + SIDE * SIDE
"""Bytes of a descriptor."""
_FLAT = 6
"""Grey levels between the darkest and the lightest place of a picture that shows nothing."""


def descriptor(picture: Picture) -> bytes:
    """What near-duplicates are looked for by: SIZE bytes, a small grey thumbnail at its full contrast, and its range."""
    small = picture.stored.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    grey = np.asarray(small.convert("L"), dtype=np.float32)
    low, high = float(grey.min()), float(grey.max())
    stretched = np.rint((grey - low) * (255 / max(1.0, high - low))).astype(np.uint8)
    found: bytes = bytes((VERSION, int(low), int(high), 0)) + stretched.tobytes()
    return found


def pairs(
    table: pd.DataFrame,
    *,
    read: Callable[[str], Picture],
    embeddings: npt.NDArray[np.float32] | None = None,  # noqa: ARG001
    progress: Progress = silent,
) -> list[Pair]:
    """The near-duplicates among the rows of a table (path, picture, descriptor, width, height), sorted.

    `read` decodes the picture at a path; only candidates are read. Files of equal pixels are told as pairs with the first
    of them, which stands for all in every other pair. `embeddings` (n, d) of the rows are not asked yet.
    """
    found: list[Pair] = []
    table = table.sort_values("path", ignore_index=True)
    for _, files in table.groupby("picture", sort=False)["path"]:
        first, *others = files
        found += [Pair(first, other, "pixels", 0.0) for other in others]
    unique = table.drop_duplicates("picture", ignore_index=True)
    data = np.frombuffer(b"".join(unique["descriptor"]), dtype=np.uint8).reshape(-1, SIZE)
    if (data[:, 0] != VERSION).any():
        raise ValueError(f"descriptors of version {sorted(set(data[:, 0].tolist()))}; expected {VERSION}")
    telling = np.flatnonzero(data[:, 2].astype(int) - data[:, 1] > _FLAT)
    thumbnails = data[telling, 4:].reshape(-1, SIDE, SIDE)
    asked = list(candidates(thumbnails))
    paths = unique["path"].tolist()

    def verified(candidate: Candidate) -> Pair | None:
        first, second = paths[telling[candidate.whole]], paths[telling[candidate.part]]
        one, two = read(first), read(second)
        alignment = align(one.stored, two.stored, box=candidate.box, mirrored=candidate.mirrored)
        if not alignment.same:
            return None
        relation = _relation(alignment, one, two, candidate)
        if (-two.width * two.height, second) < (-one.width * one.height, first):
            first, second = second, first
        return Pair(first, second, relation, min(1.0, max(0.0, 1 - alignment.agreement)))

    best: dict[tuple[str, str], Pair] = {}
    for pair in in_threads(verified, asked, progress=progress):
        if pair is not None:
            best[pair.first, pair.second] = min(pair, best.get((pair.first, pair.second), pair), key=lambda each: each.score)
    return sorted([*found, *best.values()], key=lambda pair: (pair.first, pair.second))


def _relation(alignment: Alignment, one: Picture, two: Picture, candidate: Candidate) -> Relation:
    """What became of the first picture; of several things the one that changes it most."""
    if candidate.mirrored:
        return "flipped"
    left, top, right, bottom = alignment.box
    if max(left, top, 1 - right, 1 - bottom) > 0.02:
        return "cropped"
    if (one.width, one.height) != (two.width, two.height):
        return "resized"
    return "re-encoded"


def clusters_of(pairs: Iterable[Pair], pictures: Mapping[str, str]) -> dict[str, str]:
    """The cluster of each picture that has a near-duplicate: the lowest digest of all that are joined by pairs.

    `pictures` tells the digest of the picture at each path. Pictures that only equal files show are in none.
    """
    parent: dict[str, str] = {}

    def root(picture: str) -> str:
        while (above := parent.setdefault(picture, picture)) != picture:
            parent[picture] = parent[above]
            picture = parent[picture]
        return picture

    for pair in pairs:
        if pictures[pair.first] != pictures[pair.second]:
            one, two = root(pictures[pair.first]), root(pictures[pair.second])
            parent[max(one, two)] = min(one, two)
    return {picture: root(picture) for picture in sorted(parent)}
