"""Facts: what is known of the files of a data set by looking at each of them once.

A file is decoded once, and what was found is kept for ever by its content: a file that was seen before, under whatever name,
is neither decoded nor, where its content is known already, read. What is kept may be lost or damaged; it is then found anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
from PIL import Image, features

from components import duplicates
from components.contracts.errors import UndecodableImage
from components.contracts.progress import Progress, silent
from components.formats import PINNED, Accepted, format_of, refusal, surroundings
from components.images import decode, in_threads, pixel_digest
from components.store import write_atomically
from components.tables import read_frame

if TYPE_CHECKING:
    import pandas as pd

VERSION = 1
"""Of what is kept; what another version kept is not used."""
_OF_CONTENT: Mapping[str, Any] = {
    "sha256": "",
    "picture": "",
    "bytes": 0,
    "format": "",
    "mode": "",
    "width": 0,
    "height": 0,
    "brightness": 0.0,
    "contrast": 0.0,
    "sharpness": 0.0,
    "darkest": 0.0,
    "brightest": 0.0,
    "detail": 0.0,
    "profile": "",
    "metadata": 0,
    "behind": 0,
    "behind_is": "",
    "descriptor": b"",
    "reason": "",
}
"""What a file's content alone decides, and what stands for it where it is not known."""
COLUMNS = ("path", "label", *_OF_CONTENT, "short_side", "not_served")
_PART = 4096
"""Files whose facts are written together: what a killed pass loses at most."""
_MANY_PARTS = 16
_BAND_PIXELS = 1 << 20
_SMALL = 128
"""Pixels on the long side of what `detail` is told by."""
_LEVELS = np.arange(256) / 255.0


@dataclass(frozen=True)
class File:
    """A file of a data set: where it lies, what it is called there, its label, and its content's md5 where DVC knows it."""

    place: Path
    name: str
    label: str
    md5: str = ""


def facts(
    files: Sequence[File], *, cache: Path | None = None, accepted: Accepted = PINNED, progress: Progress = silent
) -> pd.DataFrame:
    """COLUMNS of each file, in their order: luminance in [0, 1], sizes in pixels and bytes.

    `reason` says why a file cannot be used, and is empty for the others; one that cannot be read has no sha256.
    `not_served` says why serving would refuse a usable one by `accepted`; `picture` is the digest of its pixels, 32 hex.
    """
    import pandas as pd

    kept = _Kept(cache / "facts" / _decoders()) if cache is not None else None
    known = kept.read() if kept is not None else _frame({})
    # Of files of one content one is looked at; where the content is not known, each has to be read.
    keys = [file.md5 or f"file {row}" for row, file in enumerate(files)]
    unknown = pd.Index(keys).difference(known.index, sort=False)
    first = dict(zip(reversed(keys), reversed(files), strict=True))
    have = frozenset(known.index)
    found: dict[str, dict[str, Any]] = {}
    unwritten: dict[str, dict[str, Any]] = {}
    content_of: dict[str, str] = {}
    looked = in_threads(lambda key: _look(first[key].place, have), list(unknown), workers=_workers(), progress=progress)
    for key, (md5, row) in zip(unknown, looked, strict=True):
        content_of[key] = md5
        if row is not None and md5 not in found:
            found[md5] = row
            if kept is not None and row["sha256"]:
                unwritten[md5] = row
        if kept is not None and len(unwritten) >= _PART:
            kept.write(_frame(unwritten))
            unwritten = {}
    if kept is not None and unwritten:
        kept.write(_frame(unwritten))
    table = pd.concat([known, _frame(found)]).loc[[content_of.get(key, key) for key in keys]].reset_index(drop=True)
    table["path"], table["label"] = [file.name for file in files], [file.label for file in files]
    table["short_side"] = table[["width", "height"]].min(axis=1)
    table["not_served"] = _not_served(table, accepted)
    return table[list(COLUMNS)]


def unlooked(names: Sequence[str], reason: str) -> pd.DataFrame:
    """Rows as of `facts` for files that nobody looked at, without a label."""
    table = _frame({name: {**_OF_CONTENT, "reason": reason} for name in names}).reset_index(names="path")
    return table.assign(label="", short_side=0, not_served="")[list(COLUMNS)]


def _workers() -> int:
    return min(8, os.cpu_count() or 2)


def _frame(rows: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    columns = {
        name: pd.Series(
            [row[name] for row in rows.values()], dtype=type(empty) if isinstance(empty, (int, float)) else object
        )
        for name, empty in _OF_CONTENT.items()
    }
    return pd.DataFrame(columns).set_index(pd.Index(list(rows), dtype=object, name="md5"))


def _not_served(table: pd.DataFrame, accepted: Accepted) -> list[str]:
    kinds = list(zip(table["bytes"], table["format"], table["width"], table["height"], strict=True))
    told = {kind: refusal(*kind, accepted) for kind in {*kinds}}
    return ["" if reason else told[kind] for reason, kind in zip(table["reason"], kinds, strict=True)]


def _look(path: Path, known: frozenset[str]) -> tuple[str, dict[str, Any] | None]:
    """The md5 of a file's content, and what is found in it; None where that is known."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"unread {path}", {**_OF_CONTENT, "reason": f"cannot be read ({error.strerror})"}
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return md5, None if md5 in known else _of(content)


def _of(content: bytes) -> dict[str, Any]:
    kind = format_of(content)
    row = {**_OF_CONTENT, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "format": kind}
    try:
        picture = decode(content)
    except UndecodableImage as error:
        return row | {"reason": str(error)}
    image = picture.stored
    around = surroundings(content, kind)
    return row | {
        "picture": pixel_digest(picture)[:32],
        "mode": image.mode,
        "width": image.width,
        "height": image.height,
        **_luminance(image),
        "profile": picture.conversion.problem,
        "metadata": around.metadata,
        "behind": around.behind,
        "behind_is": around.behind_is,
        "descriptor": duplicates.descriptor(picture),
    }


def _luminance(image: Image.Image) -> dict[str, float]:
    """What is told by luminance in [0, 1].

    Its mean and standard deviation; the variance of its 4-neighbour Laplacian; what 5 % of the pixels lie at or under and
    1 % at or over; and that variance over the luminance's own, of the picture made small: low where it is blurred so much
    that a network would see it, whatever the contrast.
    """
    grey = image.convert("L")
    counts = np.asarray(grey.histogram(), dtype=np.float64)
    shares = counts / counts.sum()
    mean = float(shares @ _LEVELS)
    below = np.cumsum(shares)
    small = grey.reduce(max(1, -(-max(grey.size) // _SMALL)))
    values = np.asarray(small, dtype=np.float32)
    spread = float(values.var()) if small.size != grey.size else float(shares @ (_LEVELS - mean) ** 2) * 255.0**2
    whole = _laplacian_variance(grey)
    return {
        "brightness": mean,
        "contrast": float(np.sqrt(shares @ (_LEVELS - mean) ** 2)),
        "sharpness": whole / 255.0**2,
        "darkest": float(_LEVELS[np.searchsorted(below, 0.05 - 1e-9)]),
        "brightest": float(_LEVELS[np.searchsorted(below, 0.99 - 1e-9)]),
        "detail": (_laplacian_variance(small) if small.size != grey.size else whole) / spread if spread > 0 else 0.0,
    }


def _laplacian_variance(grey: Image.Image) -> float:
    """In grey levels squared; 0 under 3 pixels of a side."""
    if min(grey.size) < 3:
        return 0.0
    values = np.asarray(grey)
    total = squares = 0
    band = max(1, _BAND_PIXELS // grey.width)
    for top in range(1, grey.height - 1, band):
        # In bands: as numbers of 16 bits a large picture takes many times its own memory.
        rows = values[top - 1 : min(top + band, grey.height - 1) + 1].astype(np.int16)
        laplacian = rows[:-2, 1:-1] + rows[2:, 1:-1] + rows[1:-1, :-2] + rows[1:-1, 2:] - 4 * rows[1:-1, 1:-1]
        total += int(laplacian.sum(dtype=np.int64))
        squares += int(np.square(laplacian, dtype=np.int32).sum(dtype=np.int64))
    number = (grey.width - 2) * (grey.height - 2)
    return squares / number - (total / number) ** 2


def _decoders() -> str:
    """Names what the facts of one content depend on beside it: other decoders may see other pixels."""
    codecs = [f"{name} {features.version(name)}" for name in ("jpg", "libjpeg_turbo", "zlib", "webp", "libtiff")]
    told = "\n".join([f"facts {VERSION}", f"descriptor {duplicates.VERSION}", f"pillow {PIL.__version__}", *codecs])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


class _Kept:
    """Facts by content, in files that are named by their own digest. Nothing here raises: what is lost is found anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> pd.DataFrame:
        """All that is whole of it, by md5; many small files become one."""
        import pandas as pd

        parts: dict[Path, pd.DataFrame] = {}
        for path in sorted(self.folder.glob("*.parquet")) if self.folder.is_dir() else ():
            with contextlib.suppress(OSError):
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() != path.stem:
                    path.unlink()
                    continue
                parts[path] = read_frame(content).set_index("md5")
        if not parts:
            return _frame({})
        whole = pd.concat(parts.values())
        whole = whole[~whole.index.duplicated()]
        if len(parts) > _MANY_PARTS and self.write(whole):
            self._remove(parts)
        return whole

    def write(self, rows: pd.DataFrame) -> bool:
        """Whether they are kept now; a full disk keeps nothing, and the next pass looks again."""
        buffer = io.BytesIO()
        rows.reset_index().to_parquet(buffer, index=False, compression="zstd")
        content = buffer.getvalue()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / f"{hashlib.sha256(content).hexdigest()}.parquet", content)
        except OSError:
            return False
        return True

    def _remove(self, parts: Iterable[Path]) -> None:
        for path in parts:
            with contextlib.suppress(OSError):
                path.unlink()
