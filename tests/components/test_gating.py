from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from components import plugins
from components.choosing import Limits
from components.contracts.errors import ConfigError, TamperedArtefact, UnknownName
from components.contracts.families import Answers, Corrupted, Evidence
from components.contracts.models import Engine, Preprocessing
from components.contracts.records import FileDigest, Stored
from components.contracts.verdicts import ClassMetrics, Estimate, Evaluation, Finding, Measurement, Robustness
from components.corruptions import BEHAVIOURS, CLEAN, CORRUPTED, VARIANTS
from components.gating import Champion, GateConfig, GatingConfig, Judged, check, judge
from components.intervals import PairedScores, exact, mean_interval, paired_counts, paired_interval, wilson
from components.store import describe
from components.tasks.classification import Task

CLASSES = ("a", "b", "c")
RNG = np.random.default_rng(0)
LABELS = np.arange(300) % 3
GOOD = np.eye(3)[LABELS] * 8 + RNG.normal(0, 0.5, (300, 3))
POLICY = GatingConfig(
    gates=(
        GateConfig(gate="accuracy", settings={"floor": 0.9}),
        GateConfig(gate="class_recall", settings={"floor": 0.8}),
        GateConfig(gate="parity"),
        GateConfig(gate="latency", settings={"max_p99_ms": 50}),
        GateConfig(gate="no_regression"),
    )
)


def engine(name: str = "openvino-int8", precision: str = "int8", classes: tuple[str, ...] = CLASSES) -> Engine:
    return Engine.model_validate(
        {
            "name": name,
            "target": "openvino",
            "precision": precision,
            "settings": {},
            "checkpoint_digest": "c",
            "files": (),
            "entry": "m",
            "preprocessing": Preprocessing(
                channels=1, height=16, width=16, resize_shortest=16, interpolation="bilinear", mean=(0.5,), std=(0.5,)
            ),
            "classes": classes,
            "embedding_dim": 4,
            "temperature": 1.0,
            "runtime": "r",
            "built_for": (),
            "facts": {},
        }
    )


def measured(of: Engine, **changes: Any) -> Measurement:
    values = {
        "engine": of.name,
        "engine_digest": of.digest(),
        "status": "measured",
        "machine": "m",
        "num_runs": 300,
        "latency_p99_ms": 5.0,
        "latency_p99": {"value": 5.0, "low": 4.5, "high": 5.5, "n": 300, "method": "bootstrap"},
    }
    return Measurement.model_validate(values | changes)


def evaluated(
    of: Engine, folder: Path, logits: np.ndarray[Any, Any] = GOOD, labels: np.ndarray[Any, Any] = LABELS
) -> Stored[Evaluation]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "predictions.parquet"
    names = [f"{i:064d}" for i in range(len(labels))]
    said = [CLASSES[label] for label in labels]
    pd.DataFrame({"sha256": names, "label": said, "logits": list(logits.astype(np.float32))}).to_parquet(path)
    task = Task()
    finite = bool(np.isfinite(logits).all()) and len(labels) > 0
    record = Evaluation(
        engine=of.name,
        engine_digest=of.digest(),
        test_digest="t",
        status="evaluated",
        num_images=len(labels),
        metrics=task.metrics(logits, labels, 1.0) if finite else {},
        per_class=task.per_class(logits, labels, CLASSES) if finite else (),
        predictions=describe(path, within=folder),
    )
    return Stored(record, folder)


def verdict(tmp_path: Path, *items: Judged, policy: GatingConfig = POLICY, **changes: Any) -> Any:
    reference = evaluated(engine("torch_reference-fp32", "fp32"), tmp_path / "reference")
    values: dict[str, Any] = {"serving": "openvino-int8", "champion_known": True} | changes
    champion = values.pop("champion", None)
    return judge(items, values.pop("reference", reference), champion, policy, Task(), **values)


def item(tmp_path: Path, of: Engine | None = None, *, required: bool = True, **changes: Any) -> Judged:
    of = of or engine()
    evaluation = changes.pop("evaluation", None) or evaluated(of, tmp_path / of.name, **changes.pop("answers", {}))
    return Judged(Stored(of, tmp_path), evaluation, changes.pop("measurement", measured(of)), required)


def test_a_good_engine_passes_every_gate(tmp_path: Path) -> None:
    found = verdict(tmp_path, item(tmp_path))
    assert found.status == "pass"
    assert found.reasons == ()
    statuses = {finding.gate: finding.status for finding in found.engines[0].findings}
    assert statuses == {
        "accuracy": "pass",
        "class_recall": "pass",
        "parity": "pass",
        "latency": "pass",
        "no_regression": "not applicable",
    }


def test_a_bad_engine_is_rejected_with_reasons(tmp_path: Path) -> None:
    found = verdict(tmp_path, item(tmp_path, answers={"logits": np.roll(GOOD, 1, axis=1)}))
    assert found.status == "fail"
    assert any("accuracy" in reason for reason in found.reasons)


def test_a_required_engine_that_fails_rejects_and_an_optional_one_does_not(tmp_path: Path) -> None:
    other = engine("onnxruntime-fp32", "fp32")
    bad = {"logits": np.roll(GOOD, 1, axis=1)}
    assert verdict(tmp_path, item(tmp_path), item(tmp_path, other, answers=bad)).status == "fail"
    assert verdict(tmp_path, item(tmp_path), item(tmp_path, other, required=False, answers=bad)).status == "pass"


def not_executed(of: Engine) -> Stored[Evaluation]:
    record = Evaluation(
        engine=of.name, engine_digest=of.digest(), test_digest="t", status="not executed here", reason="no GPU"
    )
    return Stored(record, Path())


def test_an_engine_that_cannot_run_here_never_passes(tmp_path: Path) -> None:
    other = engine("tensorrt-fp32", "fp32")
    found = verdict(tmp_path, item(tmp_path), item(tmp_path, other, evaluation=not_executed(other), required=False))
    assert found.status == "pass"
    assert found.engines[1].status == "not executed here"
    required = verdict(tmp_path, item(tmp_path), item(tmp_path, other, evaluation=not_executed(other)))
    assert required.status == "inconclusive"
    assert any("no GPU" in reason for reason in required.reasons)
    serving = engine()
    alone = verdict(tmp_path, item(tmp_path, serving, evaluation=not_executed(serving)))
    assert alone.status == "inconclusive"
    assert any("no GPU" in reason for reason in alone.reasons)


def test_without_the_serving_engine_nothing_passes(tmp_path: Path) -> None:
    assert verdict(tmp_path, item(tmp_path, engine("onnxruntime-fp32", "fp32"))).status == "inconclusive"
    empty = verdict(tmp_path)
    assert empty.status == "inconclusive"
    assert empty.reasons


def test_a_gate_for_other_engines_leaves_this_one_without_evidence(tmp_path: Path) -> None:
    policy = GatingConfig(gates=(GateConfig(gate="accuracy", settings={"floor": 0.5}, engines=("another",)),))
    found = verdict(tmp_path, item(tmp_path), policy=policy)
    assert found.status == "inconclusive"
    assert "without evidence nothing is approved" in found.reasons[0]


def test_not_applicable_alone_is_no_pass(tmp_path: Path) -> None:
    policy = GatingConfig(gates=(GateConfig(gate="no_regression"),))
    found = verdict(tmp_path, item(tmp_path), policy=policy)
    assert found.status == "inconclusive"
    assert found.engines[0].status == "inconclusive"


def test_no_gate_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        GatingConfig(gates=())


def test_the_served_engine_is_chosen_among_those_that_passed(tmp_path: Path) -> None:
    int8, fp32 = engine(), engine("onnxruntime-fp32", "fp32")
    fast, slow = ({"latency_p50_ms": ms, "latency_p99_ms": 5.0} for ms in (1.0, 4.0))
    auto: dict[str, Any] = {"serving": "auto"}

    def items(**changes: Any) -> list[Judged]:
        return [
            item(tmp_path, int8, required=False, measurement=measured(int8, **fast), **changes),
            item(tmp_path, fp32, required=False, measurement=measured(fp32, **slow)),
        ]

    both = verdict(tmp_path, *items(), **auto)
    assert (both.status, both.serving_engine, both.engines[0].serving) == ("pass", "openvino-int8", True)
    assert both.engines[0].findings[-1].message.startswith("chosen of 2 engines that passed every gate")
    # An int8 engine that fails costs the candidate nothing where a float one passed.
    failed = verdict(tmp_path, *items(answers={"logits": np.roll(GOOD, 1, axis=1)}), **auto)
    assert (failed.status, failed.serving_engine) == ("pass", "onnxruntime-fp32")
    assert [engine.status for engine in failed.engines] == ["fail", "pass"]
    # What passed its gates and misses every limit is no candidate, and the limit is the reason.
    limited = verdict(tmp_path, *items(), limits=Limits(p99_ms=2), **auto)
    assert (limited.status, limited.serving_engine) == ("fail", "openvino-int8")
    assert limited.reasons[0] == "openvino-int8: serving: misses the recipe's limits: p99 latency 5 ms, at most 2"
    assert limited.policy_digest != both.policy_digest == failed.policy_digest
    six = GOOD.copy()
    six[:6] = np.roll(six[:6], 1, axis=1)
    dropped = verdict(tmp_path, *items(answers={"logits": six}), **auto)
    assert (dropped.status, dropped.serving_engine) == ("pass", "onnxruntime-fp32")
    assert "openvino-int8 is faster (p50 1 ms) but misses the recipe's limits: drops 2 points" in str(dropped.engines[1])
    # One whose release did not serve is one less to choose from, unless it is required; a choice that is made stands.
    serves = {"openvino-int8": Finding(gate="serves", status="fail", message="status 503")}
    next_one = verdict(tmp_path, *items(), **auto, unserved=serves)
    assert (next_one.status, next_one.serving_engine, next_one.engines[0].status) == ("pass", "onnxruntime-fp32", "fail")
    assert next_one.engines[0].findings[-1] == serves["openvino-int8"]
    assert next_one.engines[1].findings[-1].message.startswith("chosen of 1 engine that passed every gate")
    assert next_one.policy_digest == both.policy_digest
    for changes in ({"serving": "openvino-int8"}, auto):
        required = [replace(each, required=True) for each in items()]
        refused = verdict(tmp_path, *required, **changes, unserved=serves)
        assert (refused.status, refused.reasons) == ("fail", ("openvino-int8: serves: status 503",))
    nothing = verdict(tmp_path, **auto)
    assert (nothing.status, nothing.serving_engine) == ("inconclusive", "")
    assert nothing.reasons == ("there is no engine to serve: none passed every gate",)


@pytest.mark.parametrize(
    ("limits", "told"),
    [(Limits(memory_mb=100), "memory 140 MB, at most 100"), (Limits(size_mb=4), "size 5 MB, at most 4")],
)
def test_memory_and_size_of_an_engine_are_held_against_their_limits(tmp_path: Path, limits: Limits, told: str) -> None:
    files = (FileDigest(name="model.bin", sha256="0" * 64, bytes=5_000_000),)
    large, small = engine().model_copy(update={"files": files}), engine("onnxruntime-fp32", "fp32")
    fast = measured(large, latency_p50_ms=1.0, memory_mb=140.0)
    slow = measured(small, latency_p50_ms=4.0, memory_mb=90.0)
    items = [item(tmp_path, large, measurement=fast), item(tmp_path, small, measurement=slow)]
    assert verdict(tmp_path, *items, serving="auto").serving_engine == "openvino-int8"
    found = verdict(tmp_path, *items, serving="auto", limits=limits)
    assert found.serving_engine == "onnxruntime-fp32"
    assert told in found.engines[0].findings[-1].message


def test_where_no_engine_passed_the_order_decides_nothing_and_every_reason_is_told(tmp_path: Path) -> None:
    int8, fp32 = engine(), engine("onnxruntime-fp32", "fp32")
    bad = item(tmp_path, int8, required=False, answers={"logits": np.roll(GOOD, 1, axis=1)})
    unclear = item(tmp_path, fp32, required=False, measurement=measured(fp32, num_runs=5))
    absent = {"tensorrt-fp32": ("needs an NVIDIA GPU", False)}
    for items in ([bad, unclear], [unclear, bad]):
        found = verdict(tmp_path, *items, serving="auto", absent=absent)
        assert (found.status, found.serving_engine) == ("inconclusive", "onnxruntime-fp32")
        assert found.reasons[0] == "there is no engine to serve: none passed every gate"
        for engine_name in (
            "openvino-int8: accuracy",
            "onnxruntime-fp32: latency",
            "tensorrt-fp32: export: needs an NVIDIA",
        ):
            assert any(reason.startswith(engine_name) for reason in found.reasons)


def test_the_latency_of_another_engine_chooses_none(tmp_path: Path) -> None:
    int8, fp32 = engine(), engine("onnxruntime-fp32", "fp32")
    no_budget = GatingConfig(gates=(GateConfig(gate="accuracy", settings={"floor": 0.9}),))
    fast, slow = measured(fp32, latency_p50_ms=0.1), measured(fp32, latency_p50_ms=4.0)
    items = [item(tmp_path, int8, measurement=fast), item(tmp_path, fp32, measurement=slow)]
    found = verdict(tmp_path, *items, serving="auto", policy=no_budget)
    assert (found.status, found.serving_engine) == ("pass", "onnxruntime-fp32")


def test_an_evaluation_of_another_engine_is_no_evidence(tmp_path: Path) -> None:
    other = evaluated(engine("openvino-fp32", "fp32"), tmp_path / "other")
    assert verdict(tmp_path, item(tmp_path, evaluation=other)).status == "inconclusive"


def test_nan_logits_and_empty_sets_never_pass(tmp_path: Path) -> None:
    broken = GOOD.copy()
    broken[5] = np.nan
    assert verdict(tmp_path, item(tmp_path, answers={"logits": broken})).status == "inconclusive"
    none = {"logits": GOOD[:0], "labels": LABELS[:0]}
    of = engine()
    record = evaluated(of, tmp_path / "full").record.model_copy(update={"metrics": {}, "per_class": (), "predictions": None})
    assert verdict(tmp_path, item(tmp_path, of, evaluation=Stored(record, tmp_path))).status == "inconclusive"
    assert len(none["labels"]) == 0


def test_an_unknown_champion_is_never_taken_for_none(tmp_path: Path) -> None:
    assert verdict(tmp_path, item(tmp_path), champion_known=False).status == "inconclusive"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"status": "not executed here", "reason": "no GPU"}, "its engine cannot be executed here: no GPU"),
        (
            {"status": "not comparable", "reason": "of its classes the data share none"},
            "with: of its classes the data share",
        ),
        ({"status": "evaluated", "reason": "its logits on 5 images"}, "with: its logits on 5 images"),
        ({"status": "evaluated", "engine_digest": "x"}, "its evaluation is of another engine"),
    ],
)
def test_a_champion_without_answers_is_inconclusive_for_the_true_reason(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    of = engine("torch_reference-fp32", "fp32")
    evaluation = not_executed(of).record.model_copy(update=changes)
    found = verdict(tmp_path, item(tmp_path), champion=Champion(of, Stored(evaluation, tmp_path)))
    (finding,) = [f for f in found.engines[0].findings if f.gate == "no_regression"]
    assert finding.status == "inconclusive"
    assert why in finding.message
    assert "ledger" not in finding.message


def champion_of(folder: Path, classes: tuple[str, ...], wrong: int = 0) -> Champion:
    """A champion as evaluation leaves it: asked about the images of the classes that it shares, among these classes."""
    of = engine("openvino-fp32", "fp32", classes)
    shared = tuple(name for name in CLASSES if name in classes)
    columns = [CLASSES.index(name) for name in shared]
    kept = np.isin(LABELS, columns)
    labels = [CLASSES[label] for label in LABELS[kept]]
    logits = GOOD[kept][:, columns].copy()
    logits[:wrong] = np.roll(logits[:wrong], 1, axis=1)
    folder.mkdir()
    path = folder / "predictions.parquet"
    names = [f"{i:064d}" for i in np.flatnonzero(kept)]
    pd.DataFrame({"sha256": names, "label": labels, "logits": list(logits.astype(np.float32))}).to_parquet(path)
    record = Evaluation(
        engine=of.name,
        engine_digest=of.digest(),
        test_digest="t",
        status="evaluated",
        num_images=len(labels),
        predictions=describe(path, within=folder),
    )
    return Champion(of, Stored(record, folder))


@pytest.mark.parametrize(
    ("classes", "n", "told"),
    [
        (("a", "b"), 200, "of the 2 classes that both know (a, b), among these; new: c, judged by the floors alone"),
        (("d", "c", "b", "a"), 300, "of the 3 classes that both know (a, b, c), among these; no longer known: d"),
        (("c", "bee", "a"), 200, "new: b, judged by the floors alone; no longer known: bee; a class renamed without"),
        (("c", "b", "a"), 300, None),
    ],
)
def test_a_champion_of_other_classes_is_compared_on_those_that_both_know(
    tmp_path: Path, classes: tuple[str, ...], n: int, told: str | None
) -> None:
    found = verdict(tmp_path, item(tmp_path), champion=champion_of(tmp_path / "champion", classes))
    (finding,) = [f for f in found.engines[0].findings if f.gate == "no_regression"]
    assert (found.status, finding.status, finding.n, finding.value) == ("pass", "pass", n, 0)
    assert f"n={n}" in finding.message
    assert (told or "margin 0.02") in finding.message
    assert ("both know" in finding.message) == (told is not None)
    # Twenty of the candidate's answers on shared images are another shared class: now it is worse on these images.
    worse = GOOD.copy()
    rows = np.flatnonzero(np.isin(LABELS, [0, 2]))[:20] if classes[0] == "c" else np.flatnonzero(LABELS < 2)[:20]
    worse[rows] = worse[rows][:, ::-1] if classes[0] == "c" else worse[rows][:, [1, 0, 2]]
    found = verdict(tmp_path, item(tmp_path, answers={"logits": worse}), champion=champion_of(tmp_path / "again", classes))
    (finding,) = [f for f in found.engines[0].findings if f.gate == "no_regression"]
    assert finding.status == "fail"
    assert finding.value == pytest.approx(-20 / n)


def test_a_class_that_was_renamed_is_compared_under_its_new_name(tmp_path: Path) -> None:
    known = champion_of(tmp_path / "champion", ("c", "b", "a"))
    of = engine("openvino-fp32", "fp32", ("c", "bee", "a"))
    answered_by_new_names = known.evaluation.record.model_copy(update={"engine_digest": of.digest()})
    champion = Champion(of, Stored(answered_by_new_names, known.evaluation.folder), renamed=(("bee", "b"),))
    found = verdict(tmp_path, item(tmp_path), champion=champion)
    (finding,) = [f for f in found.engines[0].findings if f.gate == "no_regression"]
    assert (finding.status, finding.n) == ("pass", 300)
    assert "both know" not in finding.message


def test_tampered_predictions_are_refused(tmp_path: Path) -> None:
    good = evaluated(engine(), tmp_path / "e")
    path = tmp_path / "e" / "predictions.parquet"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(TamperedArtefact, match="changed after it was evaluated"):
        verdict(tmp_path, item(tmp_path, evaluation=good))


def test_wrong_policies_are_refused_before_any_work() -> None:
    with pytest.raises(UnknownName, match="unknown gate 'acuracy'; valid: accuracy"):
        check(GatingConfig(gates=(GateConfig(gate="acuracy"),)), [], robustness_images=300)
    with pytest.raises(UnknownName, match="unknown setting of gate.*'flor'; valid: floor"):
        check(GatingConfig(gates=(GateConfig(gate="accuracy", settings={"flor": 1}),)), [], robustness_images=300)
    with pytest.raises(ConfigError, match="floor"):
        check(GatingConfig(gates=(GateConfig(gate="accuracy", settings={"floor": 7}),)), [], robustness_images=300)
    with pytest.raises(UnknownName, match="unknown engine in gate 'parity' 'x'"):
        check(GatingConfig(gates=(GateConfig(gate="parity", engines=("x",)),)), ["y"], robustness_images=300)


def answered(
    logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any] = LABELS, names: Sequence[str] | None = None
) -> Answers:
    ids = tuple(names or (f"{i:064d}" for i in range(len(labels))))
    return Answers(ids, tuple(CLASSES[label] for label in labels), logits.astype(np.float32), CLASSES, Task())


def evidence(**changes: Any) -> Evidence:
    of = engine()
    answers = answered(GOOD)
    values: dict[str, Any] = {
        "engine": of,
        "evaluation": Evaluation(
            engine=of.name,
            engine_digest=of.digest(),
            test_digest="t",
            status="evaluated",
            metrics={"accuracy": wilson(299, 300)},
            per_class=tuple(
                ClassMetrics(name=name, support=100, precision=None, recall=wilson(99, 100), f1=None) for name in CLASSES
            ),
        ),
        "measurement": measured(of),
        "answers": answers,
        "reference": answers,
        "champion": None,
        "champion_known": True,
    }
    return Evidence(**(values | changes))


def flipped(count: int) -> Answers:
    logits = GOOD.copy()
    logits[:count] = np.roll(logits[:count], 1, axis=1)
    return answered(logits)


def ask(gate: str, found: Evidence, **settings: Any) -> Finding:
    finding: Finding = plugins.load("gates", gate, settings).judge(found)
    assert finding.gate == gate
    return finding


def test_accuracy_gate_is_three_way() -> None:
    assert ask("accuracy", evidence(), floor=0.95).status == "pass"
    undecided = ask("accuracy", evidence(), floor=0.99)
    assert undecided.status == "inconclusive"
    assert undecided.message.endswith("floor 0.99: too few test images to decide: there are 300, about 880 would do")
    at_the_floor = evidence().evaluation.model_copy(update={"metrics": {"accuracy": wilson(270, 300)}})
    message = ask("accuracy", evidence(evaluation=at_the_floor), floor=0.9).message
    assert message.endswith(
        "300 test images do not decide, and no number of them would as long as the value lies on the limit itself"
    )
    low = evidence().evaluation.model_copy(update={"metrics": {"accuracy": wilson(200, 300)}})
    assert ask("accuracy", evidence(evaluation=low), floor=0.9).status == "fail"


def test_class_recall_gate_looks_at_the_worst_class() -> None:
    assert ask("class_recall", evidence(), floor=0.9).status == "pass"
    undecided = ask("class_recall", evidence(), floor=0.97)
    assert undecided.status == "inconclusive"
    assert undecided.message.endswith(
        "floor 0.97: too few test images of 'a' to decide: there are 100, about 290 would do, and 2 other classes"
    )
    classes = list(evidence().evaluation.per_class)
    # A recall below the floor whose interval reaches over it decides nothing.
    classes[1] = classes[1].model_copy(update={"recall": wilson(85, 100)})
    straddling = evidence().evaluation.model_copy(update={"per_class": tuple(classes)})
    assert ask("class_recall", evidence(evaluation=straddling), floor=0.9).status == "inconclusive"
    classes[1] = classes[1].model_copy(update={"recall": wilson(60, 100)})
    worse = evidence().evaluation.model_copy(update={"per_class": tuple(classes)})
    finding = ask("class_recall", evidence(evaluation=worse), floor=0.9)
    assert finding.status == "fail"
    assert "'b'" in finding.message
    missing = evidence().evaluation.model_copy(update={"per_class": tuple(classes[:2])})
    unseen = ask("class_recall", evidence(evaluation=missing), floor=0.1)
    assert (unseen.status, unseen.message) == (
        "inconclusive",
        "too few test images of 'c' to decide: there are 0, 20 would do",
    )
    assert ask("class_recall", evidence(), floor=0.1, min_images=500).status == "inconclusive"


def test_parity_gate_compares_image_by_image() -> None:
    assert ask("parity", evidence()).status == "pass"
    assert ask("parity", evidence(answers=flipped(5))).status == "pass"
    # 290 of 300 lie under the expected 98 % and yet their interval reaches over it; 280 of 300 do not.
    assert ask("parity", evidence(answers=flipped(10))).status == "pass"
    failed = ask("parity", evidence(answers=flipped(20)))
    assert failed.status == "fail"
    assert "0.9333 [0.8993, 0.9564] (n=300), expected 98.0%; these test images prove 89.9%" in failed.message
    assert ask("parity", evidence(reference=None)).status == "inconclusive"
    other = answered(GOOD, names=["x"] * 300)
    assert ask("parity", evidence(answers=other)).status == "inconclusive"
    # One answer that is no number would be one other answer of 300, and those pass.
    broken = GOOD.copy()
    broken[7] = np.nan
    unclear = ask("parity", evidence(answers=answered(broken)))
    assert (unclear.status, unclear.message) == ("inconclusive", "some answers are not finite numbers")
    few = ask("parity", evidence(), min_images=1000)
    assert (few.status, few.message) == ("inconclusive", "too few test images to decide: there are 300, 1000 would do")
    # What is said of one precision leaves the others' defaults.
    assert ask("parity", evidence(answers=flipped(20)), min_agreement={"fp16": 0.9}).status == "fail"
    undecided = ask("parity", evidence(), min_proven=0.99)
    assert (undecided.status, undecided.message.partition(": ")[2]) == (
        "inconclusive",
        "too few test images to decide: there are 300, about 390 would do",
    )
    # Valid and calibration chose its ranges and layers: what it answers there proves nothing, for it or against it.
    beyond = {"beyond_test": flipped(300), "reference_beyond_test": answered(GOOD)}
    found = ask("parity", evidence(**beyond))
    assert (found.status, found.n) == ("pass", 300)
    assert ask("parity", evidence(**beyond), min_images=301).status == "inconclusive"
    with pytest.raises(ConfigError, match=r"min_agreement.int8: Input should be less than or equal to 1"):
        plugins.load("gates", "parity", {"min_agreement": {"int8": 95}})


def test_parity_gate_bounds_the_logits_of_fp32() -> None:
    close = answered(GOOD + 0.5)
    assert ask("parity", evidence(answers=close)).status == "pass"
    fp32 = engine("onnxruntime-fp32", "fp32")
    assert ask("parity", evidence(engine=fp32, answers=close)).status == "fail"
    # The images of valid and calibration count as well: one of them that differs is enough.
    both = {"beyond_test": answered(GOOD), "reference_beyond_test": answered(GOOD)}
    found = ask("parity", evidence(engine=fp32, **both))
    assert (found.status, found.n) == ("pass", 600)
    assert "on 600 images outside training (" in found.message
    assert found.message.endswith("0 other answers; they prove 99.4% equal answers")
    # Where no others were answered the test images are all that there is, and that is said.
    alone = ask("parity", evidence(engine=fp32))
    assert (alone.status, alone.n) == ("pass", 300)
    assert "on 300 test images (" in alone.message
    assert alone.message.endswith("they prove 98.7% equal answers")
    few = ask("parity", evidence(engine=fp32), min_images=301)
    assert few.message == "too few test images to decide: there are 300, 301 would do"
    for difference in (0.02, -0.02):
        moved = GOOD.copy()
        moved[7, 1] += difference
        assert ask("parity", evidence(engine=fp32, **both | {"beyond_test": answered(moved)})).status == "fail"
    others = answered(GOOD, names=["x"] * 300)
    assert ask("parity", evidence(engine=fp32, **both | {"beyond_test": others})).status == "inconclusive"


def test_latency_gate_wants_a_measurement_of_this_engine() -> None:
    of = engine()
    assert ask("latency", evidence(), max_p99_ms=5.5).status == "pass"
    assert ask("latency", evidence(), max_p99_ms=4.4).status == "fail"
    # The value itself may lie on either side of the budget.
    assert ask("latency", evidence(), max_p99_ms=4.8).status == "inconclusive"
    undecided = ask("latency", evidence(), max_p99_ms=5.2)
    assert undecided.status == "inconclusive"
    assert "[4.5, 5.5] of 300 runs on m, budget 5.2 ms; these runs do not decide: a quieter machine" in undecided.message
    assert ask("latency", evidence(measurement=None), max_p99_ms=6).status == "inconclusive"
    elsewhere = ask("latency", evidence(measurement=measured(of, status="not executed here", reason="no GPU")), max_p99_ms=6)
    assert (elsewhere.status, elsewhere.message) == ("inconclusive", "its latency was not measured: no GPU")
    assert ask("latency", evidence(measurement=measured(of, engine_digest="x")), max_p99_ms=6).status == "inconclusive"
    assert ask("latency", evidence(measurement=measured(of, num_runs=20)), max_p99_ms=6).status == "inconclusive"
    assert ask("latency", evidence(measurement=measured(of, latency_p99=None)), max_p99_ms=6).status == "inconclusive"


def test_no_regression_gate_is_paired() -> None:
    same = evidence().answers
    assert ask("no_regression", evidence(champion=same)).status == "pass"
    assert ask("no_regression", evidence(champion=same, answers=flipped(30))).status == "fail"
    assert ask("no_regression", evidence(champion=flipped(30))).status == "pass"
    undecided = ask("no_regression", evidence(champion=same, answers=flipped(6)))
    assert undecided.status == "inconclusive"
    assert "do not decide, and no number of them would" in undecided.message  # it is worse by the margin itself
    few = ask("no_regression", evidence(champion=same, answers=flipped(3)))
    assert "too few test images to decide: there are 300, about" in few.message
    shorter = answered(GOOD[:10], LABELS[:10])
    assert ask("no_regression", evidence(champion=shorter)).status == "inconclusive"
    relabelled = answered(GOOD, (LABELS + 1) % 3)
    assert ask("no_regression", evidence(champion=relabelled)).status == "inconclusive"


@pytest.mark.parametrize(
    ("flips", "status", "told"),
    [
        (2, "pass", "wrong where the champion was right 0.67% [0.08%, 2.39%], budget 3.00%"),
        # By their value 8 of 300 lie inside the budget and 10 outside; neither is decided.
        (8, "inconclusive", "2.67% [1.16%, 5.19%], budget 3.00%; too few test images to decide: there are 300, about"),
        (9, "inconclusive", "300 test images do not decide, and no number of them would"),
        (10, "inconclusive", "3.33% [1.61%, 6.04%], budget 3.00%; too few test images to decide: there are 300, about"),
        (18, "fail", "6.00% [3.59%, 9.32%], budget 3.00%"),
    ],
)
def test_negative_flips_have_a_budget_of_their_own(flips: int, status: str, told: str) -> None:
    """As many right as before, but other images wrong: users feel it, whatever the mean says."""
    champion, candidate = GOOD.copy(), GOOD.copy()
    champion[:flips] = np.roll(champion[:flips], 1, axis=1)
    candidate[flips : 2 * flips] = np.roll(candidate[flips : 2 * flips], 1, axis=1)
    found = evidence(champion=answered(champion), answers=answered(candidate))
    finding = ask("no_regression", found, margin=0.2, max_negative_flips=0.03)
    assert (finding.value, finding.status) == (0, status)
    assert told in finding.message


def test_a_successor_that_changes_nothing_passes_the_flips_where_it_passes_the_margin() -> None:
    """By default the margin alone says how many images that takes."""
    fewest = plugins.load("gates", "no_regression", {}).least().images
    assert fewest == plugins.load("gates", "no_regression", {"max_negative_flips": 1}).least().images == 189
    for n, status in ((188, "inconclusive"), (189, "pass")):
        labels = np.arange(n) % 3
        same = answered(np.eye(3)[labels], labels)
        assert ask("no_regression", evidence(champion=same, answers=same)).status == status
    assert plugins.load("gates", "no_regression", {"max_negative_flips": 0.01}).least().images == 368
    with pytest.raises(ConfigError, match="no number of test images proves that there are none"):
        plugins.load("gates", "no_regression", {"max_negative_flips": 0})


LOST = 111
"""Images wrong under half of the corruptions that are a little too many beside 100, and too few to fail."""


def corrupted(wrong: np.ndarray[Any, Any], unlike: int = 0, labels: np.ndarray[Any, Any] = LABELS) -> Corrupted:
    """Answers of which `wrong` (n, corruptions) are wrong, and `unlike` of a behaviour are not those of clean images."""
    logits = np.eye(3)[labels] * 8

    def some(which: np.ndarray[Any, Any]) -> Answers:
        return answered(np.where(which[:, None], np.roll(logits, 1, axis=1), logits), labels)

    shown = {CLEAN: some(np.zeros(len(labels), bool))}
    shown |= {variant: some(wrong[:, place]) for place, variant in enumerate(CORRUPTED)}
    return Corrupted(shown | {behaviour: some(np.arange(len(labels)) < unlike) for behaviour in BEHAVIOURS})


def wrong_of(images: int, share: float, n: int = 300) -> np.ndarray[Any, Any]:
    """Which answers are wrong where so many images are answered wrongly under this share of the corruptions."""
    return (np.arange(n)[:, None] < images) & (np.arange(len(CORRUPTED))[None] < share * len(CORRUPTED))


def beside(mine: Corrupted | None, theirs: Corrupted | None, **changes: Any) -> Evidence:
    values = {"champion": answered(GOOD), "corrupted": mine, "champion_corrupted": theirs}
    return evidence(**(values | changes))


def test_robustness_gate_compares_corrupted_images_with_the_champion_three_ways() -> None:
    champion = corrupted(wrong_of(100, 0.5))
    same = ask("robustness", beside(champion, champion))
    assert (same.status, same.value, same.n) == ("pass", 0.0, 300)
    assert "mean accuracy on 10 corruptions 0.8333, the champion's 0.8333: difference +0.0000 [" in same.message
    assert "mean corruption error of the 3 corruptions that the champion errs on 100.0% of the champion's" in same.message
    assert ask("robustness", beside(corrupted(wrong_of(30, 0.5)), champion)).status == "pass"
    worse = ask("robustness", beside(corrupted(wrong_of(200, 0.6)), champion))
    assert worse.status == "fail"
    assert worse.value == pytest.approx(0.5 / 3 - 0.4)
    assert ask("robustness", beside(corrupted(wrong_of(200, 0.6)), champion), margin=0.4).status == "pass"
    undecided = ask("robustness", beside(corrupted(wrong_of(LOST, 0.5)), champion))
    assert undecided.status == "inconclusive"
    needed = int(re.findall(r"there are 300, about (\d+) would do", undecided.message)[0])
    # So many images of the same kind do decide, and fewer do not.
    for times, status in ((-(-needed // 300), "pass"), (needed // 300, "inconclusive")):
        labels = np.tile(LABELS, times)
        mine, theirs = (corrupted(np.tile(wrong_of(lost, 0.5), (times, 1)), labels=labels) for lost in (LOST, 100))
        assert ask("robustness", beside(mine, theirs)).status == status
    # Where no answer differs the interval is as wide as a few images leave it.
    perfect = corrupted(wrong_of(0, 0))
    assert ask("robustness", beside(perfect, perfect), margin=0.013).status == "pass"
    assert ask("robustness", beside(perfect, perfect), margin=0.012).status == "inconclusive"
    assert "corruption error" not in ask("robustness", beside(perfect, perfect)).message


def test_robustness_gate_has_floors_that_need_no_champion() -> None:
    alone = {"champion": None}
    mine = corrupted(wrong_of(100, 0.5), unlike=20)
    assert ask("robustness", beside(mine, None, **alone)).status == "not applicable"
    assert ask("robustness", beside(mine, None, **alone), floor=0.8).status == "pass"
    assert ask("robustness", beside(mine, None, **alone), floor=0.9).status == "fail"
    undecided = ask("robustness", beside(mine, None, **alone), floor=0.82)
    assert (undecided.status, undecided.threshold) == ("inconclusive", 0.82)
    assert "too few corrupted images to decide: there are 300, about" in undecided.message
    # 280 of 300 stay the same: 0.9333 [0.8993, 0.9564].
    assert ask("robustness", beside(mine, None, **alone), min_stability={"flip": 0.89, "shift": 0.85}).status == "pass"
    unstable = ask("robustness", beside(mine, None, **alone), min_stability={"flip": 0.89, "reencoding": 0.96})
    assert unstable.status == "fail"
    assert "stay the same under reencoding 0.9333 [0.8993, 0.9564] (n=300), expected at least 0.96" in unstable.message
    assert ask("robustness", beside(mine, None, **alone), min_stability={"shift": 0.92}).status == "inconclusive"
    # A floor excuses from nothing: the champion is compared with as well.
    better = corrupted(wrong_of(0, 0))
    assert ask("robustness", beside(mine, better), floor=0.8).status == "fail"
    assert ask("robustness", beside(better, mine), floor=0.8, min_stability={"flip": 0.9}).status == "pass"
    # Not all test images were shown, so more of them are at hand.
    more = evidence().evaluation.model_copy(update={"num_images": 1000})
    hint = "(evaluation.robustness_images can take more of the 1000 test images)"
    assert hint in ask("robustness", beside(mine, None, evaluation=more, **alone), floor=0.82).message
    assert hint not in undecided.message


def test_robustness_gate_fails_closed() -> None:
    good = corrupted(wrong_of(0, 0))
    cases: dict[str, Evidence] = {
        "no corrupted pictures were shown to this engine": beside(None, good),
        "no corrupted pictures were shown to the champion": beside(good, None),
        "this engine on corrupted pictures: no GPU": beside(Corrupted({}, "no GPU"), good),
        "the champion on corrupted pictures: no GPU": beside(good, Corrupted({}, "no GPU")),
        "the champion cannot be compared with: it is gone": beside(good, good, champion_missing="it is gone"),
        "it is not known whether there is a champion": beside(good, good, champion=None, champion_known=False),
        "on pictures with jpeg-3": beside(
            Corrupted({name: each for name, each in good.answers.items() if name != "jpeg-3"}), good
        ),
        "some answers of this engine on corrupted pictures are not finite": beside(
            Corrupted({**good.answers, "noise-1": answered(np.where(np.arange(300)[:, None] == 7, np.nan, GOOD))}), good
        ),
        "was asked about other pictures under one corruption than": beside(
            Corrupted({**good.answers, "noise-1": answered(GOOD, names=["x"] * 300)}), good
        ),
        "the champion was asked about other corrupted pictures": beside(
            good, Corrupted(dict.fromkeys(VARIANTS, answered(GOOD, names=["x"] * 300)))
        ),
        "or labels than this engine": beside(good, Corrupted(dict.fromkeys(VARIANTS, answered(GOOD, (LABELS + 1) % 3)))),
        "no corrupted pictures were shown to this engine ": beside(
            Corrupted(dict.fromkeys(VARIANTS, answered(GOOD[:0], LABELS[:0]))), good
        ),
    }
    for why, found in cases.items():
        for settings in ({}, {"floor": 0.5}):
            finding = ask("robustness", found, **settings)
            assert finding.status == "inconclusive", why
            assert why.strip() in finding.message
    # Among the classes that both know, on the images of these.
    two = Corrupted({name: each.among(("a", "b")) for name, each in good.answers.items()})
    among = ask("robustness", beside(good, two))
    assert (among.status, among.n) == ("pass", 200)
    assert "(n=200 images, among the 2 classes that both know)" in among.message
    with pytest.raises(ConfigError, match=r"unknown behaviour 'turn'; expected some of flip, shift, reencoding"):
        plugins.load("gates", "robustness", {"min_stability": {"turn": 0.9}})
    with pytest.raises(ConfigError, match="less than 1"):
        plugins.load("gates", "robustness", {"min_stability": {"flip": 95}})


def shown(of: Engine, folder: Path, wrong: np.ndarray[Any, Any] | None = None) -> Stored[Robustness]:
    """What a stage writes of an engine's answers on corrupted images."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = corrupted(wrong_of(0, 0) if wrong is None else wrong).answers.items()
    frames = [
        pd.DataFrame({"sha256": a.image_ids, "label": a.labels, "variant": name, "logits": list(a.logits)})
        for name, a in rows
    ]
    pd.concat(frames).to_parquet(folder / "corrupted.parquet")
    record = Robustness(
        engine=of.name,
        engine_digest=of.digest(),
        test_digest="t",
        status="evaluated",
        num_images=300,
        answers=describe(folder / "corrupted.parquet", within=folder),
    )
    return Stored(record, folder)


def test_one_engine_in_fp32_stands_for_all_of_its_checkpoint_and_none_for_another(tmp_path: Path) -> None:
    policy = GatingConfig(gates=(GateConfig(gate="robustness", settings={"floor": 0.5}),))
    asked, alike = engine("onnxruntime-fp32", "fp32"), engine("openvino-fp32", "fp32")
    others = [engine(), alike.model_copy(update={"name": "other-fp32", "checkpoint_digest": "d"})]
    items = [item(tmp_path, of) for of in (asked, alike, *others)]
    found = verdict(tmp_path, *items, policy=policy, corrupted=[shown(asked, tmp_path / "shown")])
    (own,), (stood_for,), *without = (each.findings for each in found.engines)
    assert own.status == stood_for.status == "pass"
    assert "asked was" not in own.message
    assert stood_for.message.endswith(
        "; asked was onnxruntime-fp32, which answers alike: parity compares both with the same reference"
    )
    assert {finding.status for (finding,) in without} == {"inconclusive"}
    # The champion's answers have to be those of the champion, and as they were written.
    champion = engine("champion", "fp32")
    worse = shown(champion, tmp_path / "worse", wrong_of(0, 0))

    def compared(of: Stored[Robustness]) -> Finding:
        beside_it = Champion(champion, evaluated(champion, tmp_path / "champion"), corrupted=of)
        judged = verdict(
            tmp_path,
            items[0],
            policy=policy,
            champion=beside_it,
            corrupted=[shown(asked, tmp_path / "shown", wrong_of(150, 0.5))],
        )
        finding: Finding = judged.engines[0].findings[0]
        return finding

    assert compared(worse).status == "fail"
    foreign = Stored(worse.record.model_copy(update={"engine_digest": "x"}), worse.folder)
    assert "of the champion on corrupted pictures: they are of another engine" in compared(foreign).message
    elsewhere = Stored(shown(asked, tmp_path / "s").record.model_copy(update={"test_digest": "u"}), tmp_path / "s")
    found = verdict(tmp_path, items[0], policy=policy, corrupted=[elsewhere])
    assert "they are of another test split" in found.engines[0].findings[0].message
    (tmp_path / "worse" / "corrupted.parquet").write_bytes(b"other")
    with pytest.raises(TamperedArtefact, match=r"corrupted.parquet was changed"):
        compared(worse)


def test_a_recipe_whose_robustness_gate_could_never_pass_is_refused() -> None:
    policy = GatingConfig(gates=(GateConfig(gate="robustness"),))
    check(policy, [], robustness_images=125)
    for images in (0, 124):
        told = f"gate 'robustness' can pass on 125 corrupted images or more, and evaluation.robustness_images is {images}"
        with pytest.raises(ConfigError, match=told):
            check(policy, [], robustness_images=images)
    check(GatingConfig(gates=(GateConfig(gate="parity"),)), [], robustness_images=0)


def test_the_interval_of_scores_is_that_of_shares_where_images_are_right_or_wrong() -> None:
    for hits, n in ((300, 300), (255, 300), (17, 40), (0, 30)):
        some, all_right = np.arange(n) < hits, np.ones(n)
        share = wilson(hits, n)
        found = mean_interval(float(some.mean()), float(some.var()), n)
        assert (found.low, found.high) == pytest.approx((share.low, share.high))
        # Where nothing was gained the difference is what was lost.
        lost, nothing = wilson(n - hits, n), wilson(0, n)
        low, high = PairedScores.of(some.astype(float), all_right).interval()
        assert low == pytest.approx(-lost.high)
        assert PairedScores.of(all_right, some.astype(float)).interval() == pytest.approx((-high, -low))
        assert high == pytest.approx(-lost.value + np.hypot(nothing.high, lost.value - lost.low))
    # Beside gains it is close to Newcombe's of paired shares.
    draw = np.random.default_rng(3)
    first = draw.random(300) < 0.8
    second = np.where(draw.random(300) < 0.8, first, draw.random(300) < 0.8)
    wanted = paired_interval(*paired_counts(first, second))
    assert PairedScores.of(first.astype(float), second.astype(float)).interval() == pytest.approx(wanted, abs=0.004)
    # Images that are partly right vary less: the interval is narrower, and one such image alone changes little.
    half = mean_interval(0.5, 0.01, 300)
    assert half.high - half.low < 0.3 * (wilson(150, 300).high - wilson(150, 300).low)
    nearly = np.where(np.arange(300) == 0, 0.9, 1.0)
    low, lower = (mean_interval(float(each.mean()), float(each.var()), 300).low for each in (np.ones(300), nearly))
    assert lower < low < lower + 1e-3
    with pytest.raises(ValueError, match="no images"):
        mean_interval(1.0, 0.0, 0)
    with pytest.raises(ValueError, match="no images"):
        PairedScores.of(np.zeros(0), np.zeros(0))


@pytest.mark.parametrize("n", [150, 300])
def test_a_candidate_that_is_worse_by_the_margin_seldom_passes_the_robustness_gate(n: int) -> None:
    """Images differ in how hard they are, and some that the champion got right are lost under every corruption."""
    draw, margin, passed, equal = np.random.default_rng(11), 0.03, 0, 0
    for _ in range(800):
        right = draw.beta(1.2, 0.5, (n, 1))
        theirs = draw.random((n, 10)) < right
        alike = np.where(draw.random((n, 10)) < 0.8, theirs, draw.random((n, 10)) < right)
        lost = alike & (draw.random((n, 1)) >= margin * 1.7 / 1.2)
        passed += PairedScores.of(lost.mean(axis=1), theirs.mean(axis=1)).interval()[0] >= -margin
        equal += PairedScores.of(alike.mean(axis=1), theirs.mean(axis=1)).interval()[0] >= -margin
    assert passed / 800 <= 0.025 + 2 * (0.025 * 0.975 / 800) ** 0.5
    assert equal / 800 >= 0.75


def test_the_paired_interval_covers_the_truth() -> None:
    from components.intervals import paired_difference

    rng, covered = np.random.default_rng(5), 0
    for _ in range(400):
        shared = rng.random(200)
        found = paired_difference(shared < 0.90, np.where(rng.random(200) < 0.9, shared, rng.random(200)) < 0.88)
        covered += found.low <= 0.02 <= found.high
    assert covered / 400 >= 0.92


def test_the_exact_interval_errs_on_neither_side_more_often_than_it_says() -> None:
    from scipy.stats import binom

    for n, share in ((24, 0.04), (100, 0.15), (500, 0.03)):
        chances = binom.pmf(np.arange(n + 1), n, share)
        for interval, holds in ((exact, True), (wilson, False)):
            found = [interval(hits, n) for hits in range(n + 1)]
            above = sum(chance for chance, one in zip(chances, found, strict=True) if one.low > share)
            below = sum(chance for chance, one in zip(chances, found, strict=True) if one.high < share)
            assert (max(above, below) <= 0.025) == holds, (n, share, above, below)
    assert (exact(0, 9).low, exact(9, 9).high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="no images"):
        exact(0, 0)


def test_estimates_carry_their_n() -> None:
    assert isinstance(wilson(3, 4), Estimate)
    assert wilson(3, 4).n == 4
    with pytest.raises(ValueError, match="no images"):
        wilson(0, 0)


def test_an_engine_that_could_not_be_built_is_reported_and_never_passes(tmp_path: Path) -> None:
    found = verdict(tmp_path, item(tmp_path), absent={"tensorrt-fp32": ("not built here: no library", False)})
    assert found.status == "pass"
    assert found.engines[-1].status == "not executed here"
    required = verdict(tmp_path, item(tmp_path), absent={"tensorrt-fp32": ("not built here: no library", True)})
    assert required.status == "inconclusive"
    assert verdict(tmp_path, absent={"openvino-int8": ("not built here", False)}).status == "inconclusive"


def test_the_policy_an_approval_is_bound_to_covers_all_that_decides(tmp_path: Path) -> None:
    first = verdict(tmp_path, item(tmp_path)).policy_digest
    assert verdict(tmp_path, item(tmp_path)).policy_digest == first
    assert verdict(tmp_path, item(tmp_path, required=False)).policy_digest != first
    looser = GatingConfig(gates=(*POLICY.gates[1:], GateConfig(gate="accuracy", settings={"floor": 0.8})))
    assert verdict(tmp_path, item(tmp_path), policy=looser).policy_digest != first
