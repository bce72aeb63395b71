"""The risk-coverage curve of an engine that answers only where it is sure enough."""

from __future__ import annotations

import numpy as np
import pytest

from components.intervals import wilson
from components.selective import RiskCoverage, risk_coverage, rows


def curve(confidence: list[float], right: list[bool], **rule: object) -> RiskCoverage:
    return risk_coverage("e", np.array(confidence), np.array(right), **rule)  # type: ignore[arg-type]


def test_the_curve_and_its_area_are_those_worked_out_by_hand() -> None:
    found = curve([0.6, 0.9, 0.7, 0.8], [False, True, True, False])
    assert found.curve == ((0.25, 0.0), (0.5, 0.5), (0.75, 1 / 3), (1.0, 0.5))
    assert found.aurc.value == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
    assert found.aurc.low <= found.aurc.value <= found.aurc.high
    everything, *_, half = found.points
    assert (everything.threshold, everything.coverage.value, everything.risk) == (0.6, 1.0, wilson(2, 4))
    assert (half.threshold, half.coverage, half.risk) == (0.8, wilson(2, 4), wilson(1, 2))


def test_without_a_mistake_the_area_is_not_told_as_certain() -> None:
    found = curve([0.9, 0.8, 0.7], [True, True, True]).aurc
    assert (found.value, found.high) == (0.0, wilson(0, 3).high)


def test_equal_confidences_are_answered_together_whatever_their_order() -> None:
    right = [True, False, True, True]
    found = curve([0.9, 0.5, 0.5, 0.5], right)
    assert found.curve == ((0.25, 0.0), (1.0, 0.25))
    # Of three that are equally sure one is wrong: each brings a third of a mistake.
    assert found.aurc.value == pytest.approx((0 + (1 / 3) / 2 + (2 / 3) / 3 + 1 / 4) / 4)
    assert curve([0.5, 0.5, 0.9, 0.5], [True, False, True, True]).aurc.value == found.aurc.value


def test_confidences_that_tell_right_from_wrong_have_the_smaller_area() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(2000) < 0.9
    telling, blind = np.where(right, 0.9, 0.4) + rng.random(2000) / 100, rng.random(2000)
    told, untold = (risk_coverage("e", confidence, right) for confidence in (telling, blind))
    assert told.aurc.high < 0.01 < untold.aurc.low
    assert untold.aurc.low < 0.1 < untold.aurc.high + 0.02
    assert len(told.curve) == 200
    coverage, risk = told.curve[-1]
    assert (coverage, risk) == (1.0, float((~right).mean()))
    shares = [point.coverage.value for point in told.points]
    assert shares == [1.0, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5]


def test_the_release_stands_in_the_table_where_its_rule_puts_it() -> None:
    confidence, right = [0.95, 0.9, 0.8, 0.6], [True, False, True, False]
    answered = np.array([True, True, True, False])
    found = curve(confidence, right, answered=answered, threshold=0.75)
    assert found.released is not None
    assert (found.released.coverage, found.released.risk) == (wilson(3, 4), wilson(1, 3))
    (marked,) = [row for row in rows(found) if "release" in row[0]]
    assert marked == ("0.7500 (the release's)", "75.0%", "33.33%", "6.15% to 79.23%", "3")
    silent = curve(confidence, right, answered=np.zeros(4, dtype=np.bool_), threshold=None)
    assert rows(silent)[-1] == ("by class (the release's)", "0.0%", "nothing is answered", "", "0")
    assert RiskCoverage.read(found.to_json()) == found


def test_what_has_no_place_on_a_curve_is_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        curve([], [])
    with pytest.raises(ValueError, match="1 confidences are not finite"):
        curve([0.5, float("nan")], [True, True])
