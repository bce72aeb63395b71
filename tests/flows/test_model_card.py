"""The model card says which engine serves, by what limits, and which of them decided."""

from __future__ import annotations

from typing import Any

from components.choosing import Limits, Offer, choose
from components.contracts.verdicts import EngineVerdict, Estimate, Finding, Verdict
from components.export import ExportConfig, TargetConfig
from flows.training.model_card import choice_told

TARGETS = (TargetConfig(target="openvino", precision="int8"), TargetConfig(target="openvino"))


def verdict(told: dict[str, str]) -> Verdict:
    engines = tuple(
        EngineVerdict(
            engine=name,
            engine_digest="0",
            required=False,
            serving=name == "openvino-fp32",
            status="pass",
            findings=(
                Finding(gate="accuracy", status="pass", message="good"),
                Finding(gate="serving", status="pass", message=message),
            ),
        )
        for name, message in told.items()
    )
    fields: Any = {"status": "pass", "serving_engine": "openvino-fp32", "reasons": (), "policy_digest": "0"}
    return Verdict(engines=engines, **fields)


def test_the_limit_that_decided_is_told_with_all_limits() -> None:
    drop = Estimate(value=0.021, low=0.011, high=0.031, n=400, method="newcombe, paired")
    none = drop.model_copy(update={"value": 0.0, "low": -0.01})
    offers = [
        Offer("openvino-int8", True, p50_ms=0.9, size_mb=4, drop=drop),
        Offer("openvino-fp32", True, p50_ms=1.3, size_mb=13, drop=none),
    ]
    limits = Limits(size_mb=20)
    first, *lines = choice_told(
        ExportConfig(serving="auto", targets=TARGETS, limits=limits), verdict(choose(offers, limits).told)
    )
    assert first == "left to the recipe's limits (export.serving: auto; export.limits: size_mb 20, drop 0.01)"
    assert lines[0].startswith("openvino-int8: misses the recipe's limits: drops 2.1 points [1.10, 3.10], at most 1 point")
    assert lines[1].startswith("openvino-fp32: chosen of 2 engines that passed every gate: the one that meets every limit")
    (named,) = choice_told(ExportConfig(serving="openvino-fp32", targets=TARGETS), verdict({"openvino-fp32": ""}))
    assert named == "openvino-fp32: named by the recipe (export.serving); no limits chose it"
    assert choice_told(ExportConfig(serving="auto", targets=TARGETS), verdict({}))[1].startswith("no engine passed")
