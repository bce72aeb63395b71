"""Nearest neighbours by embedding, over an index that is kept: pictures are added to it, and it is never built anew.

An embedding of many dimensions is turned onto fewer by a fixed rotation, which keeps angles well enough to tell what is
near; the index is a graph (HNSW) on them in half precision, whose cost grows little faster than the number of pictures.
Several threads build the graph, so that what it finds may change from one build to the next. Up to some thousand
pictures all pairs are compared instead, which takes a second at most and finds the same ones always.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from components.contracts.progress import Progress, silent
from components.segments import kept_file, used

if TYPE_CHECKING:
    from usearch.index import Index

_DIMENSIONS = 128
_CONNECTIVITY, _EXPANSION_ADD, _EXPANSION_SEARCH = 8, 48, 32
_COMPARED_WHOLE = 8192  # pictures up to which all pairs are compared
_CHUNK = 16384
_DIGEST_BYTES = 32


def neighbours(
    pictures: Sequence[str],
    embeddings: npt.NDArray[np.float32],
    *,
    count: int,
    folder: Path | None = None,
    progress: Progress = silent,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Rows of the `count` nearest others of each picture and their cosines, both (n, count); row -1 where there are fewer.

    `pictures` are digests, 32 hex, of the rows of `embeddings` (n, d). With a `folder`, which must be of these embeddings'
    kind alone, the index is kept there; pictures that are no longer asked for stay in it and are never told.
    """
    from usearch.index import BatchMatches

    vectors = _rotated(embeddings)
    path = folder / "neighbours.bin" if folder is not None else None
    index, names = _opened(path, vectors.shape[1])
    known = set(names)
    missing = [row for row, name in enumerate(pictures) if name not in known]
    if path is not None:
        used(path.parent)
    for start in range(0, len(missing), _CHUNK):
        rows = missing[start : start + _CHUNK]
        index.add(np.arange(len(names), len(names) + len(rows)), vectors[rows], threads=_threads())
        names += [pictures[row] for row in rows]
        progress(start + len(rows), 2 * len(missing))
    if path is not None and missing:
        _keep(path, index, names)
    row_of = {name: row for row, name in enumerate(pictures)}
    row_of_key = np.array([row_of.get(name, -1) for name in names] + [-1], dtype=np.int64)
    asked = min(len(names), count + 1 + (8 if len(names) > len(pictures) else 0))
    rows_found = np.full((len(pictures), count), -1, dtype=np.int64)
    cosines = np.zeros((len(pictures), count), dtype=np.float32)
    lacking = np.arange(len(pictures))
    while len(lacking):
        size = max(1, _CHUNK * (count + 9) // (asked + 9))  # so that what is told at once takes the same memory
        for start in range(0, len(lacking), size):
            some = lacking[start : start + size]
            # One row more, as what is told of a single row has another shape.
            matches = index.search(vectors[[*some, some[0]]], asked, threads=_threads(), exact=len(names) <= _COMPARED_WHOLE)
            assert isinstance(matches, BatchMatches)
            for number, row in enumerate(some.tolist()):
                told = int(matches.counts[number])
                theirs, far = row_of_key[matches.keys[number, :told].astype(np.int64)], matches.distances[number, :told]
                others = np.flatnonzero((theirs >= 0) & (theirs != row))[:count]
                rows_found[row, : len(others)] = theirs[others]
                cosines[row, : len(others)] = 1 - far[others]
            progress(start + len(some), len(lacking))
        # What is nearest to some may be pictures that are gone: more of them is asked for, until there is no more.
        wanted = min(count, len(pictures) - 1)
        lacking = lacking[(rows_found[lacking] >= 0).sum(axis=1) < wanted] if asked < len(names) else lacking[:0]
        asked = min(len(names), 4 * asked)
    return rows_found, cosines


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _rotated(embeddings: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Of length 1, in at most so many dimensions."""
    vectors = np.asarray(embeddings, dtype=np.float32)
    if vectors.shape[1] > _DIMENSIONS:
        drawn = np.random.default_rng(0).normal(size=(vectors.shape[1], _DIMENSIONS))
        vectors = vectors @ np.linalg.qr(drawn)[0].astype(np.float32)
    rotated: npt.NDArray[np.float32] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return rotated


def _opened(path: Path | None, dimensions: int) -> tuple[Index, list[str]]:
    """The index that is kept there and the pictures of its keys; an empty one where there is none, or a damaged one."""
    from usearch.index import Index

    index = Index(
        ndim=dimensions,
        metric="cos",
        dtype="f16",
        connectivity=_CONNECTIVITY,
        expansion_add=_EXPANSION_ADD,
        expansion_search=_EXPANSION_SEARCH,
    )
    if path is None or not path.is_file():
        return index, []
    data = path.read_bytes()
    if hashlib.sha256(data[_DIGEST_BYTES:]).digest() != data[:_DIGEST_BYTES]:
        path.unlink(missing_ok=True)
        return index, []
    count = int.from_bytes(data[_DIGEST_BYTES : _DIGEST_BYTES + 8], "little")
    begin = _DIGEST_BYTES + 8
    names = data[begin : begin + 16 * count].hex()
    index.load(data[begin + 16 * count :])
    if len(index) != count or index.ndim != dimensions:
        raise ValueError(f"{path} holds {len(index)} vectors of {index.ndim} dimensions; expected {count} of {dimensions}")
    return index, [names[32 * i : 32 * (i + 1)] for i in range(count)]


def _keep(path: Path, index: Index, names: Sequence[str]) -> None:
    graph = index.save()
    assert graph is not None
    data = len(names).to_bytes(8, "little") + bytes.fromhex("".join(names)) + bytes(graph)
    kept_file(path, hashlib.sha256(data).digest() + data)
