from __future__ import annotations

import numpy as np
import pytest

from components.suggestions import suggest

RNG = np.random.default_rng(0)


def around(axis: int, n: int, spread: float = 0.05) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    centre = np.zeros(16)
    centre[axis] = 1
    return (centre + spread * RNG.standard_normal((n, 16))).astype(np.float32)


def test_what_is_unsure_new_and_unlike_the_others_is_suggested_first() -> None:
    known = np.concatenate([around(0, 50), around(1, 50)])
    pool = np.concatenate([around(0, 40), around(1, 40), around(2, 10), np.repeat(around(3, 1), 5, axis=0)])
    confidence = np.full(95, 0.99)
    confidence[7] = 0.5  # like the known ones, but unsure
    confidence[80:] = 0.6
    found = suggest(pool, confidence, known, most=20)
    rows = [each.row for each in found]
    # One of the cluster that is new and one of the picture that is there five times; then the unsure one, and no other.
    assert {rows[0] // 80, rows[1] // 80} == {1}
    assert len([row for row in rows if row >= 90]) == 1
    assert 7 in rows
    assert not [row for row in rows if row < 80 and row != 7]
    assert len(rows) < 20
    assert all(each.is_unlike == (each.row >= 80) for each in found)
    assert [each.gain for each in found] == sorted((each.gain for each in found), reverse=True)
    assert found[0].gain == 1
    # The length of an embedding says nothing.
    lengths = RNG.uniform(0.1, 10, (len(pool), 1)).astype(np.float32)
    again = [each.row for each in suggest(pool * lengths, confidence, 3 * known, most=20)]
    assert [min(row, 90) for row in again] == [min(row, 90) for row in rows]  # the last five are one picture
    assert [each.row for each in suggest(pool, confidence, known, most=1)] == rows[:1]
    # One odd picture among the known ones does not change what distance is usual.
    odd = suggest(pool, confidence, np.concatenate([known, around(5, 1)]), most=20)
    assert all(each.is_unlike == (each.row >= 80) for each in odd)


def test_pictures_that_are_known_already_are_never_suggested() -> None:
    known = around(0, 30)
    assert suggest(known[:10], np.full(10, 0.3), known, most=5) == []


@pytest.mark.parametrize(
    ("pool", "known", "text"),
    [
        (around(0, 3), around(0, 3)[:, :8], "cannot be compared"),
        (around(0, 3), around(0, 0), "no known picture"),
        (np.full((3, 16), np.nan, np.float32), around(0, 3), "not finite"),
    ],
)
def test_values_that_cannot_be_compared_are_refused(pool: object, known: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        suggest(pool, np.ones(3), known, most=2)  # type: ignore[arg-type]
