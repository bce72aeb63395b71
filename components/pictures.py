"""Prepared pictures, decoded once: the engine's very input, by picture and preprocessing, in a cache.

Training and serving decode by the same code (components/images.py), so what is kept here are the bits that serving sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from components import plugins
from components.contracts.errors import DataDiffers, UndecodableImage
from components.contracts.models import Preprocessing
from components.contracts.progress import Progress, silent
from components.contracts.records import canonical_json, sha256_text
from components.images import decode, in_threads, pixel_digest, prepare
from components.segments import Kept, Segments

if TYPE_CHECKING:
    from collections.abc import Iterator


def prepared(
    pictures: Sequence[str],
    paths: Sequence[Path],
    preprocessing: Preprocessing,
    *,
    cache: Path,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda _: None,
) -> Kept:
    """The images at `paths`, whose picture digests are `pictures`, as inputs uint8 (h, w, c); decoded where not cached.

    `say` is told once when the disk does not take them. Raises DataDiffers, UndecodableImage.
    """
    shape = (preprocessing.height, preprocessing.width, preprocessing.channels)
    segments = Segments(folder_of(preprocessing, cache), np.uint8, shape, say=say)

    def compute(rows: Sequence[int], _: int) -> npt.NDArray[np.uint8]:
        return np.stack(list(load_all([(paths[row], pictures[row]) for row in rows], preprocessing)))

    missing = list({picture: row for row, picture in enumerate(pictures) if picture not in segments.known}.values())
    for start in range(0, len(missing), segments.chunk):
        if segments.full:
            break
        chunk = missing[start : start + segments.chunk]
        segments.append([pictures[row] for row in chunk], compute(chunk, 0))
        progress(start + len(chunk), len(missing))
    return Kept(pictures, [segments], compute)


def folder_of(preprocessing: Preprocessing, cache: Path) -> Path:
    """Where a cache keeps pictures that are prepared so."""
    return cache / "pictures" / _digest(preprocessing)[:32]


def load_all(
    members: Sequence[tuple[Path, str]], preprocessing: Preprocessing, *, progress: Progress = silent
) -> Iterator[npt.NDArray[np.uint8]]:
    """Prepared images (h, w, c) of paths and their picture digests, in order; raises DataDiffers, UndecodableImage."""

    def load(member: tuple[Path, str]) -> npt.NDArray[np.uint8]:
        path, expected = member
        try:
            picture = decode(path.read_bytes())
        except UndecodableImage as error:
            raise UndecodableImage(f"{path}: {error}") from None
        if pixel_digest(picture)[: len(expected)] != expected:
            raise DataDiffers(f"{path} was changed while the run read it; restore it, or `visionloop data add`")
        return prepare(picture, preprocessing)

    return in_threads(load, members, progress=progress)


def _digest(preprocessing: Preprocessing) -> str:
    """sha256 of all that a prepared picture depends on besides the picture."""
    versions = {library: metadata.version(library) for library in ("numpy", "pillow")}
    return sha256_text(canonical_json([preprocessing.to_json(), plugins.source_digest(Path(__file__)), versions]))
