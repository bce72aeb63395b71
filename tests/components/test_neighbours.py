from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.neighbours import neighbours


def names(count: int) -> list[str]:
    return [f"{number:032x}" for number in range(count)]


def embeddings(count: int, dimensions: int = 300) -> np.ndarray:
    """Pairs of neighbours: each even row's nearest is the one behind it."""
    draw = np.random.default_rng(0)
    found = np.repeat(draw.normal(size=(count // 2, dimensions)), 2, axis=0)
    return (found + 0.1 * draw.normal(size=found.shape)).astype(np.float32)


def test_the_nearest_are_told_with_their_cosines() -> None:
    vectors = embeddings(400)
    rows, cosines = neighbours(names(400), vectors, count=3)
    assert rows.shape == cosines.shape == (400, 3)
    assert (rows[:, 0] == np.arange(400) ^ 1).all()
    assert cosines[:, 0] == pytest.approx(1 / 1.01, abs=0.02)


def test_more_pictures_are_searched_by_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.neighbours._COMPARED_WHOLE", 399)
    rows, cosines = neighbours(names(400), embeddings(400), count=3)
    # Several threads build the graph: over 200 builds the share was 0.985 at its lowest.
    nearest = rows[:, 0] == np.arange(400) ^ 1
    assert nearest.mean() > 0.9
    assert cosines[nearest, 0] == pytest.approx(1 / 1.01, abs=0.02)


def test_pictures_are_added_to_the_index_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from usearch.index import Index

    added: list[int] = []
    add = Index.add

    def counted(index: Index, keys: np.ndarray, *arguments: Any, **settings: Any) -> object:
        added.append(len(keys))
        return add(index, keys, *arguments, **settings)

    monkeypatch.setattr(Index, "add", counted)
    vectors = embeddings(100)
    neighbours(names(80), vectors[:80], count=1, folder=tmp_path)
    rows, _ = neighbours(names(100), vectors, count=1, folder=tmp_path)
    assert added == [80, 20]
    assert (rows[:, 0] == np.arange(100) ^ 1).all()
    # Fewer pictures, in another order: those that are gone are never told.
    chosen = np.array([7, 6, 30, 31, 50])
    rows, _ = neighbours([names(100)[i] for i in chosen], vectors[chosen], count=1, folder=tmp_path)
    assert rows[:4, 0].tolist() == [1, 0, 3, 2]
    assert rows[4, 0] in range(4), "its nearest is gone, and the next one is told"
    assert added == [80, 20]


def test_a_damaged_index_is_made_anew(tmp_path: Path) -> None:
    vectors = embeddings(40)
    first, _ = neighbours(names(40), vectors, count=1, folder=tmp_path)
    (kept,) = tmp_path.iterdir()
    data = bytearray(kept.read_bytes())
    # The names of two pictures change places, so that every other part of it can be read.
    at = [data.index(bytes.fromhex(names(40)[number])) for number in (10, 20)]
    data[at[0] : at[0] + 16], data[at[1] : at[1] + 16] = data[at[1] : at[1] + 16], data[at[0] : at[0] + 16]
    kept.write_bytes(data)
    again, _ = neighbours(names(40), vectors, count=1, folder=tmp_path)
    assert (again == first).all()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_pictures_than_neighbours(count: int) -> None:
    rows, _ = neighbours(names(count), embeddings(2)[:count], count=5)
    assert (rows >= 0).sum() == (2 if count == 2 else 0)
