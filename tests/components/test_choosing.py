"""Which of the engines that passed is served, and what is said of the others."""

from __future__ import annotations

import numpy as np
import pytest

from components.choosing import Limits, Offer, choose, images_a_second_a_core, price_of_a_million
from components.contracts.verdicts import Estimate
from components.intervals import paired_difference


def drop(points: float) -> Estimate:
    return Estimate(value=points / 100, low=points / 100 - 0.01, high=points / 100 + 0.01, n=400, method="newcombe, paired")


INT8 = Offer("openvino-int8", True, p50_ms=0.9, p99_ms=2.0, size_mb=4.0, memory_mb=90, drop=drop(2.1))
FP32 = Offer("openvino-fp32", True, p50_ms=1.3, p99_ms=2.5, size_mb=13.0, memory_mb=140, drop=drop(0.0))
ORT = Offer("onnxruntime-fp32", True, p50_ms=4.1, p99_ms=9.0, size_mb=13.1, memory_mb=110, drop=drop(0.0))
ALL = [ORT, FP32, INT8]


def test_the_fastest_within_the_limits_is_chosen_and_the_limit_that_decided_is_told() -> None:
    found = choose(ALL, Limits())
    assert (found.engine, found.is_servable) == ("openvino-fp32", True)
    assert found.told["openvino-fp32"] == (
        "chosen of 3 engines that passed every gate: the fastest of 2 that meet every limit (p50 1.3 ms); openvino-int8 is "
        "faster (p50 0.9 ms) but misses the recipe's limits: drops 2.1 points [1.10, 3.10], at most 1 point"
    )
    assert found.told["onnxruntime-fp32"] == "meets every limit; openvino-fp32 is faster (p50 1.3 ms against p50 4.1 ms)"
    assert choose(ALL, Limits(drop=0.03)).engine == "openvino-int8"
    assert choose(ALL, Limits(drop=None)).engine == "openvino-int8"


def test_engines_whose_rounds_overlap_are_tied_and_the_smaller_one_serves_whichever_median_is_lower() -> None:
    def measured(name: str, size_mb: float, *rounds: float) -> Offer:
        return Offer(name, True, p50_ms=sorted(rounds)[2], rounds_p50_ms=rounds, size_mb=size_mb, drop=drop(0.0))

    slow = measured("onnxruntime-fp32", 1.0, 3.0, 3.1, 3.2, 3.3, 3.4)
    large = measured("openvino-fp32", 13.0, 1.0, 1.1, 1.2, 1.3, 1.4)
    for rounds in ((1.1, 1.2, 1.3, 1.4, 1.5), (0.8, 0.9, 1.0, 1.1, 1.2)):
        small = measured("openvino-int8", 4.0, *rounds)
        found = choose([large, slow, small], Limits())
        assert found.engine == "openvino-int8"
        assert "the smallest of 2 whose rounds overlap, of 3 that meet every limit" in found.told["openvino-int8"]
        assert found.told["openvino-fp32"].startswith(
            "meets every limit; openvino-int8 is as fast within the rounds of the measurement, and no larger"
        )
        assert found.told["openvino-fp32"].endswith("4 MB against 13)")
        assert found.told["onnxruntime-fp32"].startswith("meets every limit; openvino-int8 is faster (")
    # What is surely slower is not served for its size, and of equals the name decides.
    surely = measured("openvino-int8", 4.0, 1.5, 1.6, 1.7, 1.8, 1.9)
    assert choose([surely, large, slow], Limits()).engine == "openvino-fp32"
    twin = measured("openvino-fp16", 13.0, 1.0, 1.1, 1.2, 1.3, 1.4)
    assert choose([large, twin], Limits()).engine == choose([twin, large], Limits()).engine == "openvino-fp16"
    # One that misses a limit ties with none.
    tight = choose([large, slow, measured("openvino-int8", 4.0, 1.1, 1.2, 1.3, 1.4, 1.5)], Limits(p99_ms=1))
    assert not tight.is_servable


@pytest.mark.parametrize(
    ("limits", "missed"),
    [
        ({"p99_ms": 2.4}, "p99 latency 2.5 ms, at most 2.4"),
        ({"size_mb": 12}, "size 13 MB, at most 12"),
        ({"memory_mb": 139}, "memory 140 MB, at most 139"),
        ({"drop": 0.002}, "drops 0.3 points [-0.70, 1.30], at most 0.2 points"),
    ],
)
def test_the_one_limit_that_the_fastest_misses_decides_and_is_named(limits: dict[str, float], missed: str) -> None:
    fast = Offer("openvino-fp32", True, p50_ms=1.3, p99_ms=2.5, size_mb=13.0, memory_mb=140, drop=drop(0.3))
    slow = Offer("onnxruntime-fp32", True, p50_ms=2.0, p99_ms=2.1, size_mb=4.0, memory_mb=110, drop=drop(0.1))
    # What an engine has of each is what it may have: it then meets the limit.
    just = Limits(p99_ms=2.5, size_mb=13, memory_mb=140, drop=fast.drop.value if fast.drop else None)
    assert choose([slow, fast], just).engine == "openvino-fp32"
    found = choose([slow, fast], just.model_copy(update=limits))
    assert (found.engine, found.is_servable) == ("onnxruntime-fp32", True)
    assert found.told["openvino-fp32"] == f"misses the recipe's limits: {missed}"
    assert found.told["onnxruntime-fp32"].endswith(f"openvino-fp32 is faster (p50 1.3 ms) but {found.told['openvino-fp32']}")
    # Alone it is not served either, and the limit is why.
    alone = choose([fast], just.model_copy(update=limits))
    assert (alone.engine, alone.is_servable, alone.told) == ("openvino-fp32", False, {fast.engine: found.told[fast.engine]})


def test_what_drops_by_just_the_limit_meets_it() -> None:
    # As rounded means, 0.97 - 0.96 is more than 0.01, and 0.57 - 0.56 less.
    for right in range(1, 101):
        one, other = np.arange(100) < right, np.arange(100) < right - 1
        assert Offer("e", True, drop=paired_difference(one, other)).missed(Limits(drop=0.01)) == []
        assert Offer("e", True, drop=paired_difference(one, other)).missed(Limits(drop=0.0099)) != []


def test_what_did_not_pass_is_never_chosen_and_what_is_not_measured_meets_no_limit() -> None:
    failed = Offer("openvino-int8", False, p50_ms=0.1, drop=drop(0))
    assert choose([failed, ORT], Limits()).engine == "onnxruntime-fp32"
    unmeasured = Offer("openvino-fp32", True, p50_ms=0.5, p99_ms=0.6)
    found = choose([unmeasured, ORT], Limits(memory_mb=500))
    assert (found.engine, found.is_servable) == ("onnxruntime-fp32", True)
    assert found.told["openvino-fp32"].endswith("memory not measured, at most 500 MB; drop not measured, at most 1 point")
    # An engine whose speed nobody knows is no faster than one that was measured.
    unknown = Offer("litert-fp32", True, drop=drop(0))
    assert choose([unknown, ORT], Limits()).engine == "onnxruntime-fp32"
    assert choose([unknown], Limits(p99_ms=9)).told == {
        "litert-fp32": "misses the recipe's limits: p99 latency not measured, at most 9 ms"
    }


def test_where_nothing_meets_the_limits_the_nearest_is_named_and_not_served() -> None:
    found = choose(ALL, Limits(p99_ms=1, size_mb=5))
    assert (found.engine, found.is_servable) == ("openvino-int8", False)
    assert found.told["openvino-int8"].startswith("misses the recipe's limits: p99 latency 2 ms, at most 1")
    none = choose([Offer("openvino-int8", False), Offer("onnxruntime-fp32", False)], Limits())
    assert (none.engine, none.is_servable, none.told) == ("openvino-int8", False, {})
    undecided = Offer("openvino-fp32", False, is_undecided=True)
    assert choose([Offer("openvino-int8", False), undecided], Limits()).engine == "openvino-fp32"
    assert choose([], Limits()).engine == ""


def test_what_answers_cost() -> None:
    assert images_a_second_a_core(5.0, 2) == 100
    # A million answers of 3.6 ms each take an hour.
    assert price_of_a_million(3.6, 0.25) == pytest.approx(0.25)
