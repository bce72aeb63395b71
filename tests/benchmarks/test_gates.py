"""A small simulation with a fixed seed: the gates err no more often than their intervals say, and still decide."""

from __future__ import annotations

from bench.gates import floor_shares, paired_shares, power

MOST = 0.05
"""Of 400 models 2.5 % are 10; more than 20 come by chance once in a thousand times. An interval of 80 % makes it 40."""


def test_models_on_the_limit_are_passed_and_failed_as_rarely_as_the_interval_says() -> None:
    found = [
        *paired_shares(500, 0.95, 400),
        *floor_shares("accuracy", 0.85, 500, 400),
        *floor_shares("class_recall", 0.8, 500, 400),
    ]
    assert len(found) == 9
    assert {each.name: each.share for each in found if each.share > MOST} == {}
    # The models do lie on the limits: by the measured value about half of them would pass, and half fail.
    on_the_limit = [each for each in found if each.truth != "no true difference"]
    assert all(0.3 < each.by_value < 0.7 for each in on_the_limit), {each.name: each.by_value for each in on_the_limit}


def test_a_gate_that_errs_rarely_decides_all_the_same() -> None:
    same, worse = power(10_000, 0.98, 0.0, 20), power(10_000, 0.95, -0.04, 20)
    assert (same["pass"], worse["fail"]) == (1.0, 1.0)
