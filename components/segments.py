"""Caches of arrays by picture: folders of files that are only added, verified when opened, then read row by row.

A segment is one safetensors file, named by its sha256, that holds the `names` of pictures and their rows of `data`. It
appears by one rename, so a kill costs the segment that was being written, and several processes may add to one folder. A
cache may be lost, never believed: what does not verify is removed and computed again, and what a full disk does not take
is computed again whenever it is taken. Rows are read, not mapped: the kernel maps far more around a row than is asked for,
and all of it would count as this process's memory (infra/decisions/0017).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
import weakref
from collections.abc import Callable, KeysView, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from components.contracts.errors import TamperedArtefact
from components.store import sha256_file, write_atomically

if TYPE_CHECKING:
    import torch

_CHUNK_BYTES, _CHUNK_ROWS = 32 << 20, 4096
_STALE_S = 3600
"""Nobody takes as long to write a segment: what is older was left by a kill."""
_SPELLED = {"uint8": "U8", "float16": "F16", "float32": "F32"}
"""The dtypes that are kept, as safetensors spells them."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


KINDS = ("features", "maps", "pictures", "encoders", "duplicates", "probabilities", "neighbours")
"""Folders of the workspace's cache that hold what can be computed again. Downloaded weights are none of them."""
_limits: dict[Path, int] = {}
_used: set[Path] = set()
"""Cache folders that this run uses: they give way to nothing."""


@dataclass(frozen=True)
class CacheFolder:
    """The files of one key: rows in one view, or an encoder."""

    folder: Path
    used_at: float
    """When it was last opened or added to, in seconds since the epoch."""
    bytes: int

    def remove(self) -> None:
        """Remove its files, and the folders that are empty then; who has them open keeps them."""
        for path in self.folder.iterdir():
            if not path.is_dir():
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()
            self.folder.parent.rmdir()


def cache_folders(cache: Path) -> list[CacheFolder]:
    """The folders below a workspace's cache that hold what can be computed again, the least recently used first."""
    found = []
    for kind in KINDS:
        for place, _, files in os.walk(cache / kind):
            folder = Path(place)
            with contextlib.suppress(FileNotFoundError):
                if files:
                    size = sum((folder / name).stat().st_size for name in files)
                    found.append(CacheFolder(folder, folder.stat().st_mtime, size))
    return sorted(found, key=lambda each: (each.used_at, each.folder))


def limit(cache: Path, num_bytes: int) -> None:
    """Let what this process keeps below `cache` grow to so many bytes: what was not used for longest gives way.

    A run that starts in the same process uses nothing yet.
    """
    _limits[cache] = num_bytes
    _used.clear()


def limit_of(cache: Path) -> int | None:
    """How large what this process keeps below `cache` may grow; None for any size."""
    return _limits.get(cache)


def used(folder: Path) -> None:
    """A cache folder is in use: the time of the folder says so to later runs."""
    _used.add(folder)
    with contextlib.suppress(OSError):
        os.utime(folder)


def kept_file(path: Path, data: bytes) -> bool:
    """Write a file of a cache in one rename; false where the disk is full, or the limit reached by what is in use."""
    try:
        if not _has_room(path.parent, len(data)):
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        return False
    return True


def _has_room(folder: Path, num_bytes: int) -> bool:
    """Whether a file of this size fits under the limit, after all that it takes of what is not in use gave way."""
    for cache, most in _limits.items():
        if cache not in folder.parents:
            continue
        there = cache_folders(cache)
        excess = sum(each.bytes for each in there) + num_bytes - most
        idle = [each for each in there if each.folder not in _used]
        if excess > sum(each.bytes for each in idle):
            return False
        for each in idle:
            if excess > 0:
                each.remove()
                excess -= each.bytes
    return True


def names_in(folder: Path) -> set[str]:
    """The pictures whose rows the files of a folder say they hold; nothing is verified, nor marked as used."""
    from safetensors import SafetensorError, safe_open

    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError, SafetensorError), safe_open(path, "numpy") as file:
            found |= {digest.tobytes().hex() for digest in file.get_tensor("names")}
    return found


class Segments:
    """Rows of one dtype and shape by picture digest, in a folder of their own; `say` is told once when there is no space."""

    def __init__(
        self, folder: Path, dtype: npt.DTypeLike, shape: tuple[int, ...], *, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.folder, self.dtype, self.shape = folder, np.dtype(dtype), shape
        self.full = False
        """Whether there was no space for a segment; no other one is tried."""
        self._say = say
        self._places: dict[str, tuple[int, int]] = {}
        """The open file of each picture's row, and where in it the row begins."""
        used(folder)
        for path in sorted(folder.glob("*.safetensors")):
            self._open(path)
        for path in folder.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_S:
                    path.unlink()

    @property
    def known(self) -> KeysView[str]:
        """The pictures whose rows are here."""
        return self._places.keys()

    @property
    def chunk(self) -> int:
        """How many rows a segment should hold: what a kill can cost, and what is held in memory while it is made."""
        return max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // self._row_bytes))

    @property
    def _row_bytes(self) -> int:
        return max(1, int(np.prod(self.shape)) * self.dtype.itemsize)

    def append(self, names: Sequence[str], array: npt.NDArray[Any]) -> None:
        """Keep the rows (n, *shape) of pictures, if the disk takes them; `full` says so otherwise."""
        from safetensors.numpy import save

        if self.full or not names:
            return
        rows = np.ascontiguousarray(array, dtype=self.dtype)
        if rows.shape != (len(names), *self.shape):
            raise ValueError(f"rows of shape {rows.shape}; expected {(len(names), *self.shape)}")
        digests = np.frombuffer(bytes.fromhex("".join(names)), dtype=np.uint8).reshape(len(names), -1)
        data = save({"data": rows, "names": digests})
        path = self.folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        if kept_file(path, data):
            self._take_up(path)
            return
        self.full = True
        self._say(
            f"no space left for the cache {self.folder.parent}, on the disk or under VISIONLOOP_CACHE_GB: what it does not "
            f"hold is computed again whenever it is needed, which takes longer; free some space, or raise the limit, before "
            f"the next run"
        )

    def rows(self, names: Sequence[str]) -> npt.NDArray[Any]:
        """The rows (n, *shape) of known pictures; raises KeyError for another one, TamperedArtefact where a file was cut."""
        found = np.empty((len(names), *self.shape), dtype=self.dtype)
        as_bytes: Any = found.reshape(len(names), self._row_bytes // self.dtype.itemsize).view(np.uint8)
        for name, row in zip(names, as_bytes, strict=True):
            file, begin = self._places[name]
            if os.preadv(file, [row], begin) != len(row):
                raise TamperedArtefact(
                    f"a file of {self.folder} was cut short while this run read it; run again to have it made anew"
                )
        return found

    def _open(self, path: Path) -> None:
        try:
            if sha256_file(path) == path.stem and self._take_up(path):
                return
        except FileNotFoundError:
            return  # another process found it damaged first
        path.unlink(missing_ok=True)

    def _take_up(self, path: Path) -> bool:
        """Take up a verified segment; false where its rows are of another shape."""
        with path.open("rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(begin - 8))
            data, names = header["data"], header["names"]
            if data["dtype"] != _SPELLED[self.dtype.name] or tuple(data["shape"][1:]) != self.shape:
                return False
            file.seek(begin + names["data_offsets"][0])
            digests = np.frombuffer(file.read(int(np.prod(names["shape"]))), dtype=np.uint8).reshape(names["shape"])
            kept_open = os.dup(file.fileno())
        weakref.finalize(self, os.close, kept_open)
        for row, digest in enumerate(digests):
            place = begin + data["data_offsets"][0] + row * self._row_bytes
            self._places[digest.tobytes().hex()] = kept_open, place
        return True


class Kept:
    """Inputs of a fit, by picture in one cache a view; what a cache could not keep is computed when it is taken.

    `compute` makes the rows of these positions, in one view, as the caches hold them.
    """

    def __init__(
        self,
        pictures: Sequence[str],
        views: Sequence[Segments],
        compute: Callable[[Sequence[int], int], npt.NDArray[Any]],
    ) -> None:
        self._pictures, self._views, self._compute = pictures, views, compute

    def __len__(self) -> int:
        return len(self._pictures)

    def take(self, rows: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """The inputs (n, ...) at these rows: each one's first view, or with a generator any of its views, drawn from it."""
        import torch

        count = len(self._views)
        views = [0] * len(rows)
        if generator is not None and count > 1:
            views = torch.randint(count, (len(rows),), generator=generator).tolist()
        first = self._views[0]
        found = np.empty((len(rows), *first.shape), dtype=first.dtype)
        positions = rows.tolist()
        for view in sorted(set(views)):
            here = [i for i, chosen in enumerate(views) if chosen == view]
            found[here] = self._of_view([positions[i] for i in here], view)
        return torch.from_numpy(found)

    def views(self) -> list[npt.NDArray[Any]]:
        """All rows (n, ...), an array a view, the first view first: for inputs of which there are few."""
        return [self._of_view([*range(len(self))], view) for view in range(len(self._views))]

    def _of_view(self, positions: list[int], view: int) -> npt.NDArray[Any]:
        segments = self._views[view]
        names = [self._pictures[position] for position in positions]
        lost = [i for i, name in enumerate(names) if name not in segments.known]
        if not lost:
            return segments.rows(names)
        found = np.empty((len(names), *segments.shape), dtype=segments.dtype)
        there = [i for i, name in enumerate(names) if name in segments.known]
        found[there] = segments.rows([names[i] for i in there])
        found[lost] = self._compute([positions[i] for i in lost], view)
        return found
