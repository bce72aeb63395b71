"""What `decisions` makes of answers that are known: which truth is established, what counts as right, false and undecided."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench._evidence import Simulated
from bench._trainings import Part
from bench.decisions import Model, _mislabelled, judgements, truth_of
from components.contracts.families import Answers


def _right(n: int, *wrong: range) -> Answers:
    right = np.ones(n, dtype=np.bool_)
    for places in wrong:
        right[places] = False
    return Simulated(n).of(right)


@pytest.mark.parametrize(
    ("candidate", "champion", "says"),
    [
        (range(0), range(200), "pass"),
        (range(200), range(0), "fail"),
        (range(60), range(60, 120), "fail"),  # As accurate, and over the budget of 5 %: 60 of 600 images are lost.
        (range(10), range(10, 20), "pass"),
        (range(14), range(0), "inconclusive"),  # A loss of 2.3 %, whose interval straddles the margin of 2 %.
    ],
)
def test_a_truth_is_established_by_both_questions_and_by_their_intervals(
    candidate: range, champion: range, says: str
) -> None:
    assert truth_of(_right(600, candidate), _right(600, champion)).says == says


def test_what_the_gate_says_against_the_truth_is_false_and_not_right() -> None:
    worse = Model(judged=_right(400), truth=_right(600, range(200)))
    found = judgements("worse", 0, worse, Model(_right(400), _right(600)))
    assert ([each.status for each in found.findings], found.truth.says) == (["pass"], "fail")
    assert (found.right, found.num_false(["pass", "fail", "inconclusive"])) == ([False], 1)
    assert (found.by_value, found.right_by_value) == (("pass",), [False])


def test_the_value_alone_decides_both_questions_on_whatever_images_there_are() -> None:
    models = [Model(_right(60, wrong), _right(600)) for wrong in (range(2), range(2, 4), range(20, 40), range(3, 7))]
    said = [judgements("any", 0, models[0], champion).by_value for champion in models[1:]]
    said += [judgements("any", 0, candidate, models[0]).by_value for candidate in models[2:]]
    # As good; better by 18 and by 2 images; worse by 18; and worse by 2 of 60, which is more than the margin.
    assert [each for (each,) in said] == ["pass", "pass", "pass", "fail", "fail"]
    over = judgements("any", 0, Model(_right(60, range(4)), _right(600)), Model(_right(60, range(4, 8)), _right(600)))
    assert over.by_value == ("fail",)  # As accurate, and 4 of 60 lost.


def test_small_groups_are_rightly_undecided_where_they_say_what_would_decide_and_that_is_tried() -> None:
    same = Model(_right(400), _right(600))
    few = judgements("same recipe", 0, same, same, 50)
    assert ([each.status for each in few.findings], few.right) == (["inconclusive"] * 8, [True] * 8)
    # Where no answer differs the margin takes 189 images, which is rounded up to two digits; so many are there.
    assert (few.would_decide, few.tried) == ((190,) * 8, ("pass",) * 8)
    # On all 400 undecided is not right: that is enough to pass.
    worse = Model(_right(400, range(8)), _right(600))
    all_of_them = judgements("same recipe", 0, worse, same)
    assert ([each.status for each in all_of_them.findings], all_of_them.right) == (["inconclusive"], [False])


def test_small_groups_share_no_image_and_leave_none_out() -> None:
    worse, same = Model(_right(400, range(7)), _right(600)), Model(_right(400), _right(600))
    few = judgements("same recipe", 0, worse, same, 50)
    assert round(sum(50 * (each.value or 0) for each in few.findings)) == -7


def test_a_share_of_the_labels_becomes_another_class() -> None:
    part = Part(
        [f"{place}" for place in range(90)], [Path(f"{place}") for place in range(90)], [0] * 30 + [1] * 30 + [2] * 30
    )
    wrong = _mislabelled(part, 3, np.random.default_rng(0))
    assert sum(one != other for one, other in zip(part.labels, wrong.labels, strict=True)) == 36
    assert set(wrong.labels) == {0, 1, 2}
    assert wrong.paths == part.paths
