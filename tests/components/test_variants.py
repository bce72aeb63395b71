"""What is held against a variant on valid images, and which one the rule takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from components import plugins
from components.choosing import Limits
from components.contracts.models import Engine, Preprocessing
from components.contracts.records import Stored
from components.contracts.verdicts import Estimate, Evaluation, Measurement
from components.gating import GateConfig, GatingConfig
from components.intervals import wilson
from components.store import describe
from components.tasks.classification import Task
from components.variant_rule import most_accurate, not_beaten, pick
from components.variants import ChoiceConfig, Objective, Variant, missed

CLASSES = ("a", "b")


def variant(name: str, right: int, p50: float, *, mb: float = 1.0, rate: float = 100.0, **facts: Any) -> Variant:
    """So many right answers of a hundred; its rounds lie 5 % to both sides of its times."""
    values = {
        "status": "measured",
        "headline": wilson(right, 100),
        "difference": Estimate(value=-0.03, low=-0.05, high=-0.01, n=100, method="m"),
        "p50_ms": p50,
        "rounds_p50_ms": (p50 * 0.95, p50, p50 * 1.05),
        "images_a_second": Estimate(value=rate, low=rate, high=rate, n=3, method="m"),
        "rounds_images_a_second": (rate * 0.95, rate, rate * 1.05),
        "size_bytes": round(mb * 1e6),
    }
    return Variant(name=name, backbone="n", passes="p", engine="e", **{**values, **facts})


ALL = (
    variant("large", 95, 20, mb=9, rate=40),
    variant("middle", 94, 10, mb=5, rate=95),
    variant("twin", 94, 10.8, mb=4, rate=100),
    variant("small", 92, 4, mb=3, rate=300),
    variant("limited", 99, 2, mb=0.5, rate=900, missed=("too much memory",)),
    variant("elsewhere", 100, 1, mb=0.1, status="not executed here", reason="it needs a GPU"),
)


@pytest.mark.parametrize(
    ("objective", "within", "chosen", "why"),
    [
        # Two rounds overlap, so the smaller one; the fastest of all is too far below.
        (
            "fastest",
            0.01,
            "twin",
            "chosen: the smallest of 2 whose rounds overlap, which are the fastest of 3 variants within 1",
        ),
        ("fastest", 0.03, "small", "chosen: the fastest of 4 variants within 3 points of the most accurate, large"),
        ("cheapest", 0.01, "twin", "which are the cheapest of 3"),
        ("smallest", 0.01, "twin", "chosen: the smallest of 3 variants within 1 point"),
        ("most_accurate", 0.01, "large", "chosen: the most accurate of 4 that meet every limit"),
        ("fastest", 0.0, "large", "chosen: the fastest of 1 variant within 0 points of the most accurate, large"),
    ],
)
def test_limits_come_first_then_accuracy_then_what_was_asked_for(
    objective: Objective, within: float, chosen: str, why: str
) -> None:
    found = pick(ALL, ChoiceConfig(objective=objective, within=within))
    assert found.chosen == chosen
    assert why in found.told[chosen]
    assert found.told["limited"] == "too much memory"
    assert found.told["elsewhere"] == "it needs a GPU"
    assert found.nearest == ""
    assert sorted(found.told) == sorted(one.name for one in ALL)
    # The same whatever the order in which they were found.
    assert pick(ALL[::-1], ChoiceConfig(objective=objective, within=within)).chosen == chosen


def test_what_is_not_taken_is_told_why() -> None:
    told = pick(ALL, ChoiceConfig()).told
    assert told["small"] == "3.00 points [1.00, 5.00] below the most accurate, large; at most 1 point"
    assert told["middle"] == (
        "meets every limit; twin is as fast within the rounds of the measurement, and no larger (4 MB against 5)"
    )
    assert told["large"] == "meets every limit; twin is faster (p50 10.8 ms against 20)"


@pytest.mark.parametrize(
    ("config", "unproven"),
    [
        ({"within": 0.03}, "; 100 valid images cannot prove that: it may be 5.00 points below"),
        ({"within": 0.05}, ""),
        ({"within": 0.0}, ""),  # the most accurate one itself
        ({"objective": "most_accurate"}, ""),
    ],
)
def test_a_chosen_variant_whose_interval_goes_beyond_what_is_asked_says_so(config: dict[str, Any], unproven: str) -> None:
    found = pick(ALL, ChoiceConfig(**config))
    assert found.told[found.chosen].partition("large")[2] == unproven


def test_where_nothing_meets_the_limits_the_nearest_is_told_and_none_is_taken() -> None:
    two, one = (variant(name, right, 1, missed=what) for name, right, what in (("x", 99, ("a", "b")), ("y", 60, ("a",))))
    found = pick([two, one, ALL[-1]], ChoiceConfig())
    assert (found.chosen, found.nearest) == ("", "y")
    assert found.told["x"] == "a; b"
    best = most_accurate([two, one])
    assert best is not None
    assert best.name == "x"
    assert pick([ALL[-1]], ChoiceConfig()).nearest == ""


def test_what_no_other_one_beats_in_both_is_joined() -> None:
    measured = ALL[:5]
    assert [one.name for one in not_beaten(measured, lambda one: one.latency_ms)] == ["limited"]
    front = not_beaten([*measured[:4], variant("same", 95, 20)], lambda one: one.latency_ms)
    assert [one.name for one in front] == ["small", "middle", "large", "same"]


def test_every_gate_is_asked_and_values_alone_decide(tmp_path: Path) -> None:
    """Gates that pass by value do not reject for want of images, and those that need what is only known of test are silent."""
    engine = Engine(
        name="openvino-int8",
        target="openvino",
        precision="int8",
        settings={},
        checkpoint_digest="c",
        files=(),
        entry="m",
        preprocessing=Preprocessing(
            channels=1, height=16, width=16, resize_shortest=16, interpolation="bilinear", mean=(0.5,), std=(0.5,)
        ),
        classes=CLASSES,
        embedding_dim=4,
        temperature=1.0,
        runtime="r",
        built_for=(),
        facts={},
    )
    labels = np.arange(40) % 2
    logits = np.eye(2, dtype=np.float32)[labels] * 4
    logits[:4] = logits[:4, ::-1]
    logits[0:4:2] = logits[0:4:2, ::-1]  # both that are wrong are of class b
    names = [CLASSES[label] for label in labels]
    path = tmp_path / "predictions.parquet"
    pd.DataFrame({"sha256": [f"{i:064d}" for i in range(40)], "label": names, "logits": list(logits)}).to_parquet(path)
    task = Task()
    evaluation = Evaluation(
        engine=engine.name,
        engine_digest=engine.digest(),
        test_digest="v",
        status="evaluated",
        num_images=40,
        metrics=task.metrics(logits, labels, 1.0),
        per_class=task.per_class(logits, labels, CLASSES),
        predictions=describe(path, within=tmp_path),
    )
    measurement = Measurement(
        engine=engine.name,
        engine_digest=engine.digest(),
        status="measured",
        machine="m",
        num_runs=300,
        latency_p99_ms=12.1,
        latency_p99=Estimate(value=12.1, low=9, high=15, n=300, method="m"),
    )
    worst = evaluation.per_class[1].recall
    one = variant(
        "v", 38, 10, headline=evaluation.metrics["accuracy"], worst_class="b", worst_recall=worst, p99_ms=12.1, drop=None
    )

    def told(accuracy: float, recall: float, latency: float, limits: Limits | None = None, **only: Any) -> list[str]:
        settings = {"accuracy": {"floor": accuracy}, "class_recall": {"floor": recall}, "latency": {"max_p99_ms": latency}}
        gates = [GateConfig(gate=name, settings=settings.get(name, {}), **only) for name in plugins.names("gates")]
        stored = Stored(evaluation, tmp_path)
        return missed(one, engine, stored, measurement, GatingConfig(gates=tuple(gates)), limits, task)

    assert told(0.949, 0.899, 12.2) == []  # whose intervals lie on both sides of them
    assert told(0.951, 0.901, 10) == [
        f"not accurate enough: accuracy 0.9500 [{one.headline.low:.4f}, {one.headline.high:.4f}], floor 0.951",  # type: ignore[union-attr]
        f"too weak in class 'b': recall 0.9000 [{worst.low:.4f}, {worst.high:.4f}], floor 0.901",
        "too slow: p99 12.1 ms, limit 10 ms",
    ]
    assert told(0.951, 0.901, 10, engines=("another",)) == []
    limited = told(0.9, 0.8, 20, Limits(p99_ms=12, size_mb=0.5, memory_mb=100))
    assert limited == [
        "p99 latency 12.1 ms, at most 12",
        "memory not measured, at most 100 MB",
        "drop not measured, at most 1 point",
    ]
