"""Near-duplicates: pictures that are copies of one another, stored anew, resized, cropped, mirrored or brightened.

Candidates are told by small descriptors that are computed once for each picture, and each of them is verified on the pixels
themselves. Likeness alone, of descriptors or of embeddings, never makes a pair. Pictures that were turned by an angle, and
crops that leave less than two thirds of a side, are not looked for. Of pictures under SMALLEST pixels only those of equal
pixels are copies: of so few pixels, look-alikes cannot be told from copies.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from components import alignment, plugins
from components.alignment import Alignment, Grey, align, grey
from components.candidates import SIDE, Candidate, candidates, matched, refined
from components.clusters import joined_by
from components.contracts.issues import Pair, Relation
from components.contracts.progress import Progress, silent
from components.contracts.records import canonical_json, sha256_text
from components.contracts.wording import counted
from components.images import Picture, in_threads
from components.neighbours import neighbours
from components.segments import Segments, kept_file, used

if TYPE_CHECKING:
    import pandas as pd

VERSION = 1
"""Of the descriptor; what was computed by another one is not comparable."""
SIZE = 4 + SIDE * SIDE
"""Bytes of a descriptor."""
RELATIONS: tuple[Relation, ...] = get_args(Relation)
"""Their numbers are kept; the first, of equal pixels, is never told of two pictures."""
SMALLEST = 32
"""Pixels on the short side under which pictures are not compared."""
_FLAT = 6
"""Grey levels between the darkest and the lightest place of a picture that shows nothing."""
_NEIGHBOURS, _LEAST_COSINE = 8, 0.8
"""How many of the nearest embeddings are candidates, and how near they have to be."""
_CROPPED = 0.02
_OTHER_CONTRAST, _OTHER_BRIGHTNESS = 0.05, 5.0
_GREYS = 64
_Told = tuple[str, str, Relation, float]


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
    embeddings: npt.NDArray[np.float32] | None = None,
    embeddings_key: str = "",
    cache: Path | None = None,
    progress: Progress = silent,
) -> list[Pair]:
    """The near-duplicates among the rows of a table (path, picture, descriptor, short_side); `first` has no fewer pixels.

    They are sorted. `read` decodes the picture at a path, for candidates alone, and for none that were compared before where
    there is a `cache`. Files of equal pixels are pairs with the first of them, which stands for all in every other pair.
    `embeddings` (n, d) of the rows bring more candidates, found by an index kept by `embeddings_key`: what made them.
    """
    order = np.argsort(table["path"].to_numpy(dtype=str), kind="stable")
    table = table.iloc[order].reset_index(drop=True)
    is_first = ~table.duplicated("picture").to_numpy()
    first = dict(zip(table["picture"][is_first], table["path"][is_first], strict=True))
    found = [
        Pair(first[picture], path, "pixels", 0.0)
        for path, picture in zip(table["path"], table["picture"], strict=True)
        if first[picture] != path
    ]
    chosen = is_first & ~_is_small(table).to_numpy()
    vectors = None if embeddings is None else embeddings[order][chosen]
    unique = table[chosen]
    names = dict(zip(unique["picture"], unique["path"], strict=True))
    comparisons = _Comparisons(names, read, cache)
    kept = None
    if cache is not None and (vectors is None or embeddings_key):  # what brought other candidates has to have a name
        kept = cache / "duplicates" / _digest(list(names), embeddings_key if vectors is not None else "")
    told = _read_pairs(kept / "pairs.json") if kept is not None else None
    if told is None:
        asked = _asked(unique, vectors, embeddings_key, cache, progress)
        told = comparisons.told(asked, progress)
        if kept is not None:
            kept_file(kept / "pairs.json", _sealed(told))
    elif kept is not None:
        used(kept)
    found += [Pair(names[one], names[two], relation, score) for one, two, relation, score in told]
    return sorted(found, key=lambda pair: (pair.first, pair.second))


def told_of_small(table: pd.DataFrame) -> str:
    """What a person should know of the files of a table (short_side) that `pairs` does not compare; empty where all are."""
    number = int(_is_small(table).sum())
    if not number:
        return ""
    what = f"{counted(number, 'picture')} under {SMALLEST} pixels"
    return f"{what}: only copies of equal pixels are looked for among such small ones"


def _is_small(table: pd.DataFrame) -> pd.Series:
    return table["short_side"] < SMALLEST


def _asked(
    unique: pd.DataFrame,
    embeddings: npt.NDArray[np.float32] | None,
    embeddings_key: str,
    cache: Path | None,
    progress: Progress,
) -> list[tuple[str, str, Candidate]]:
    """Pictures that may be copies, by their digests."""
    data = np.frombuffer(b"".join(unique["descriptor"]), dtype=np.uint8).reshape(-1, SIZE)
    if (data[:, 0] != VERSION).any():
        raise ValueError(f"descriptors of version {sorted(set(data[:, 0].tolist()))}; expected {VERSION}")
    telling = np.flatnonzero(data[:, 2].astype(int) - data[:, 1] > _FLAT)
    thumbnails = data[telling, 4:].reshape(-1, SIDE, SIDE)
    found = list(candidates(thumbnails, progress=_noted(progress, "candidates")))
    digests = unique["picture"].to_numpy(dtype=object)[telling]
    if embeddings is not None and len(telling):
        folder = cache / "duplicates" / sha256_text(f"index {embeddings_key}")[:32] if cache and embeddings_key else None
        nearest, cosines = neighbours(
            digests.tolist(),
            embeddings[telling],
            count=_NEIGHBOURS,
            folder=folder,
            progress=_noted(progress, "neighbours"),
        )
        rows, columns = np.nonzero((nearest >= 0) & (cosines >= _LEAST_COSINE))
        others = nearest[rows, columns]
        near = np.unique(np.stack([np.minimum(rows, others), np.maximum(rows, others)]), axis=1)
        found += matched(thumbnails, near[0], near[1])
    return [(digests[each.whole], digests[each.part], each) for each in refined(thumbnails, found)]


class _Comparisons:
    """Pictures compared pixel by pixel, each two once for ever where there is a cache."""

    def __init__(self, paths: Mapping[str, str], read: Callable[[str], Picture], cache: Path | None) -> None:
        self._paths, self._read = paths, read
        self._greys: dict[str, Grey] = {}
        self._lock = threading.Lock()
        folder = cache / "duplicates" / plugins.source_digest(Path(alignment.__file__))[:32] if cache else None
        self._kept = Segments(folder, np.float32, (3,)) if folder is not None else None

    def told(self, asked: Sequence[tuple[str, str, Candidate]], progress: Progress) -> list[_Told]:
        """Larger and other picture, relation and score of those that are copies."""
        views: dict[tuple[str, str], list[Candidate]] = {}
        for one, two, candidate in asked:
            views.setdefault((min(one, two), max(one, two)), []).append(candidate)
        digests = {candidate: (one, two) for one, two, candidate in asked}
        answers = dict.fromkeys(views, np.zeros(3, dtype=np.float32))
        if self._kept is not None:
            here = [key for key in views if "".join(key) in self._kept.known]
            answers |= dict(zip(here, self._kept.rows(["".join(key) for key in here]), strict=True))
            unknown = [key for key in views if "".join(key) not in self._kept.known]
        else:
            unknown = list(views)

        def compare(key: tuple[str, str]) -> npt.NDArray[np.float32]:
            return self._compared(key, [(digests[candidate], candidate) for candidate in views[key]])

        size = self._kept.chunk if self._kept is not None else len(unknown)
        compared = in_threads(compare, unknown, progress=_noted(progress, "comparing"))
        while chunk := list(zip(unknown, itertools.islice(compared, size), strict=False)):
            unknown = unknown[len(chunk) :]
            answers |= dict(chunk)
            if self._kept is not None:
                self._kept.append(["".join(key) for key, _ in chunk], np.stack([row for _, row in chunk]))
        return [
            (*(reversed(key) if turned else key), RELATIONS[int(relation)], float(score))
            for key, (relation, score, turned) in sorted(answers.items())
            if relation
        ]

    def _compared(self, key: tuple[str, str], views: Sequence[tuple[tuple[str, str], Candidate]]) -> npt.NDArray[np.float32]:
        """The number of the relation (0 for none), the score, and whether the second picture is the larger one."""
        best: tuple[float, float] | None = None
        for (whole, part), candidate in views:
            one, two = self._grey(whole), self._grey(part)
            found = align(one, two, box=candidate.box, mirrored=candidate.mirrored)
            if found.same:
                score = min(1.0, max(0.0, 1 - found.agreement))
                relation = RELATIONS.index(_relation(found, one, two, candidate.mirrored))
                best = min(best or (score, relation), (score, relation))
        if best is None:
            return np.zeros(3, dtype=np.float32)
        sizes = [self._grey(picture).width * self._grey(picture).height for picture in key]
        larger_second = sizes[1] > sizes[0] or (sizes[1] == sizes[0] and self._paths[key[1]] < self._paths[key[0]])
        return np.array([best[1], best[0], larger_second], dtype=np.float32)

    def _grey(self, picture: str) -> Grey:
        """The picture in grey; the last few are kept, as candidates share pictures."""
        with self._lock:
            known = self._greys.pop(picture, None)
            if known is not None:
                self._greys[picture] = known
                return known
        made = grey(self._read(self._paths[picture]).stored)
        with self._lock:
            self._greys[picture] = made
            while len(self._greys) > _GREYS:
                del self._greys[next(iter(self._greys))]
        return made


def _relation(found: Alignment, one: Grey, two: Grey, mirrored: bool) -> Relation:
    """What became of the picture; of several things the one that changes it most."""
    if mirrored:
        return "flipped"
    left, top, right, bottom = found.box
    if max(left, top, 1 - right, 1 - bottom) > _CROPPED:
        return "cropped"
    if (one.width, one.height) != (two.width, two.height):
        return "resized"
    if abs(found.contrast - 1) > _OTHER_CONTRAST or abs(found.brightness) > _OTHER_BRIGHTNESS:
        return "near"
    return "re-encoded"


def _noted(progress: Progress, note: str) -> Progress:
    return lambda done, total, _="": progress(done, total, note)


def _digest(pictures: Sequence[str], embeddings_key: str) -> str:
    """Names what the pairs of these pictures depend on."""
    code = plugins.source_digest(Path(__file__))
    return sha256_text(canonical_json([code, VERSION, embeddings_key, sorted(pictures)]))[:32]


def _sealed(told: Sequence[_Told]) -> bytes:
    text = json.dumps(told)
    return f"{sha256_text(text)}\n{text}".encode()


def _read_pairs(path: Path) -> list[_Told] | None:
    """What was kept of these very pictures; None where there is nothing, or it is damaged."""
    try:
        digest, text = path.read_text().split("\n", 1)
    except (OSError, ValueError):
        return None
    if sha256_text(text) != digest:
        path.unlink(missing_ok=True)
        return None
    return [(one, two, relation, score) for one, two, relation, score in json.loads(text)]


def clusters_of(pairs: Iterable[Pair], pictures: Mapping[str, str]) -> dict[str, str]:
    """The cluster of each picture that has a near-duplicate: the lowest digest of all that are joined by pairs.

    `pictures` tells the digest of the picture at each path. Pictures that only equal files show are in none.
    """
    return joined_by((pictures[pair.first], pictures[pair.second]) for pair in pairs)
