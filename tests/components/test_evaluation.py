from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from shapes import stored

from components import evaluation, plugins
from components.contracts.data import DataVersion, Splits
from components.contracts.errors import EngineUnavailable
from components.contracts.models import Engine, Preprocessing
from components.contracts.records import Stored
from components.contracts.verdicts import Evaluation, Measurement, Verdict
from components.evaluation import EvaluationConfig, evaluate, measure, summarised
from components.machine import fingerprint
from components.store import describe
from components.tasks.classification import Task

CONFIG = EvaluationConfig(latency_runs=20, latency_warmup_runs=2)


def run(trained: Path, out: Path, engine: Stored[Engine] | None = None) -> Evaluation:
    out.mkdir()
    engine = engine or stored(trained, "export/openvino-int8", Engine)
    return evaluate(
        engine,
        stored(trained, "splitting", Splits),
        trained / "data",
        plugins.load("tasks", "classification"),
        CONFIG,
        out=out,
    )


def test_an_evaluation_is_deterministic_and_counts_every_image(trained: Path, tmp_path: Path) -> None:
    first, second = run(trained, tmp_path / "a"), run(trained, tmp_path / "b")
    assert first == second
    splits = stored(trained, "splitting", Splits).record
    assert first.num_images == splits.counts["test"] == sum(sum(row) for row in first.confusion)
    table = pd.read_parquet(tmp_path / "a" / "predictions.parquet")
    assert len(table) == first.num_images
    assert table["embedding"].iloc[0].dtype == np.float16
    assert (table["label"] == table["predicted"]).mean() == pytest.approx(first.metrics["accuracy"].value)
    assert set(first.metrics) == {"accuracy", "mean_class_accuracy", "log_loss", "ece"}
    assert (first.beyond_test, (tmp_path / "a" / "beyond_test.parquet").exists()) == (None, False)


def test_in_fp32_every_image_outside_training_is_answered_for_parity(trained: Path) -> None:
    splits = stored(trained, "splitting", Splits)
    table = pd.read_parquet(splits.folder / splits.record.table.name)
    expected = {split: set(table.loc[table["split"] == split, "sha256"]) for split in ("valid", "calibration")}
    for name in ("torch_reference-fp32", "onnxruntime-fp32", "openvino-int8"):
        found = stored(trained, f"evaluation/{name}", Evaluation)
        if name == "openvino-int8":
            assert found.record.beyond_test is None
            continue
        asked = pd.read_parquet(found.folder / found.record.beyond_test.name)
        assert set(asked["sha256"]) == expected["valid"] | expected["calibration"]
        # Nothing is scored on them: they are no test images.
        assert found.record.num_images == splits.record.counts["test"]
    gates = stored(trained, "gating", Verdict).record.engines
    parity = {e.engine: next(f for f in e.findings if f.gate == "parity") for e in gates}
    assert parity["onnxruntime-fp32"].n == len(table) - splits.record.counts["train"]
    assert parity["openvino-int8"].n == splits.record.counts["test"]


def replaced(monkeypatch: pytest.MonkeyPatch, predict: Any) -> None:
    class Broken:
        def predict(self, images: Any) -> Any:
            return predict(images)

    monkeypatch.setattr(evaluation, "load", lambda engine, threads: Broken())


def test_an_engine_that_cannot_run_here_is_said_so(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(engine: Any, threads: int) -> Any:
        raise EngineUnavailable("built, not executed here: no GPU")

    monkeypatch.setattr(evaluation, "load", refuse)
    found = run(trained, tmp_path / "out")
    assert (found.status, found.reason, found.metrics) == ("not executed here", "built, not executed here: no GPU", {})
    engine, splits = stored(trained, "export/openvino-int8", Engine), stored(trained, "splitting", Splits)
    (measured,) = measure([engine], splits, trained / "data", CONFIG)
    assert measured.status == "not executed here"


def test_an_engine_built_for_pictures_prepared_otherwise_is_not_evaluated(trained: Path, tmp_path: Path) -> None:
    engine = stored(trained, "export/openvino-int8", Engine)
    wider = engine.record.preprocessing.model_copy(
        update={"resize_shortest": 2 * engine.record.preprocessing.resize_shortest}
    )
    found = run(trained, tmp_path / "out", Stored(engine.record.model_copy(update={"preprocessing": wider}), engine.folder))
    assert (found.status, found.metrics, found.predictions) == ("not executed here", {}, None)
    assert "was built for pictures that are prepared otherwise" in found.reason


def test_non_finite_logits_have_no_metrics(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, lambda images: (np.full((len(images), 3), np.nan, np.float32), np.zeros((len(images), 16))))
    found = run(trained, tmp_path / "out")
    assert found.metrics == {}
    assert "test images are not finite numbers" in found.reason


def test_answers_of_another_shape_are_refused(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, lambda images: (np.zeros((len(images), 7), np.float32), np.zeros((len(images), 16))))
    with pytest.raises(EngineUnavailable, match="does not belong to this label space"):
        run(trained, tmp_path / "out")


def test_a_measurement_names_its_machine_and_its_runs(trained: Path) -> None:
    engine, splits = stored(trained, "export/openvino-int8", Engine), stored(trained, "splitting", Splits)
    (found,) = measure([engine], splits, trained / "data", CONFIG)
    assert found.machine == fingerprint()
    assert found.num_runs == 20
    assert found.latency_p50_ms is not None
    assert found.latency_p90_ms is not None
    assert found.latency_p99_ms is not None
    assert 0 < found.latency_p50_ms <= found.latency_p90_ms <= found.latency_p99_ms
    assert found.size_bytes == engine.record.size_bytes


def test_engines_take_turns_and_what_was_noisy_is_measured_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocessing = Preprocessing(
        channels=1, height=8, width=8, resize_shortest=8, interpolation="bilinear", mean=(0.5,), std=(0.5,)
    )
    common: dict[str, Any] = {"target": "openvino", "precision": "int8", "settings": {}, "checkpoint_digest": "c"}
    common |= {
        "runtime": "r",
        "built_for": (),
        "facts": {},
        "files": (),
        "entry": "m",
        "preprocessing": preprocessing,
        "classes": ("a", "b"),
        "embedding_dim": 4,
    }
    engines = [Stored(Engine(name=name, temperature=1.0, **common), tmp_path) for name in ("one", "other")]
    asked: list[str] = []

    def timed(*other_s: float) -> list[Measurement]:
        """The first engine takes 3 ms in every round, the other one these seconds in its rounds."""
        asked.clear()
        left = list(other_s)

        def one_round(predictor: str, *_: Any) -> Any:
            asked.append(predictor)
            return np.full(4, 3e-3 if predictor == "one" else left.pop(0))

        monkeypatch.setattr(evaluation, "load", lambda engine, _: engine.record.name)
        monkeypatch.setattr(evaluation, "_round", one_round)
        monkeypatch.setattr(evaluation, "rows", lambda *_: {"path": pd.Series([], dtype=str)})
        monkeypatch.setattr(evaluation, "batches", lambda *_, **__: [np.zeros((1, 8, 8, 1), np.uint8)])
        no_splits: Any = None
        return measure(engines, no_splits, tmp_path, CONFIG)

    bad = [1e-3] * 4 + [5e-3]
    calm, again = timed(*bad, 2e-3, 2e-3, 2e-3, 2e-3, 4e-3)
    assert asked == [*("one", "other") * 5, *["other"] * 5]
    assert (calm.num_attempts, calm.latency_p50_ms, calm.spread) == (1, 3.0, 1.0)
    assert (again.num_attempts, again.latency_p50_ms, again.spread) == (2, 2.0, 2.0)
    _, kept = timed(*bad, 6e-3, 6e-3, 6e-3, 6e-3, 60e-3)
    assert (kept.num_attempts, kept.latency_p50_ms, kept.spread) == (2, 1.0, 5.0)


def test_a_noisy_round_does_not_decide_and_is_told(trained: Path) -> None:
    engine = stored(trained, "export/openvino-int8", Engine).record
    calm, busy = np.linspace(1e-3, 1.2e-3, 8), np.linspace(9e-3, 30e-3, 8)
    quiet = summarised(engine, [calm] * 5, CONFIG)
    found = summarised(engine, [calm, busy, calm, calm, calm], CONFIG)
    assert (found.latency_p50_ms, found.latency_p99_ms) == (quiet.latency_p50_ms, quiet.latency_p99_ms)
    assert (quiet.noisy, found.noisy, found.num_runs) == (False, True, 40)
    assert max(found.rounds_p99_ms) > 29
    # Two of five rounds may be drawn more often than the others: the interval knows of the noisy one.
    narrow, wide = quiet.latency_p99, found.latency_p99
    assert narrow is not None
    assert wide is not None
    assert (narrow.n, narrow.value, wide.value) == (40, quiet.latency_p99_ms, quiet.latency_p99_ms)
    assert 1.0 < narrow.low <= narrow.value <= narrow.high <= 1.2
    assert wide.high > 20
    assert found == summarised(engine, [calm, busy, calm, calm, calm], CONFIG)


def test_the_reference_is_a_target_like_any_other() -> None:
    assert "torch_reference" in plugins.names("targets")


@pytest.mark.parametrize(
    ("classes", "shared"),
    [
        # The engine's columns stay cross, disc, stripes; only their names differ.
        (("cross", "disc", "squares"), ("cross", "disc")),
        (("stripes", "disc", "cross"), ("cross", "disc", "stripes")),
    ],
)
def test_a_champion_of_another_label_space_is_asked_about_what_it_knows(
    trained: Path, tmp_path: Path, classes: tuple[str, ...], shared: tuple[str, ...]
) -> None:
    engine = stored(trained, "export/openvino-int8", Engine)
    run(trained, tmp_path / "whole")
    found = run(trained, tmp_path / "out", Stored(engine.record.model_copy(update={"classes": classes}), engine.folder))
    whole, table = (pd.read_parquet(tmp_path / name / "predictions.parquet") for name in ("whole", "out"))
    labels = whole["path"].str.split("/").str[0]
    whole = whole[labels.isin(shared)].reset_index(drop=True)
    assert found.num_images == len(table) == len(whole)
    assert list(table["path"]) == list(whole["path"])
    assert list(table["label"]) == list(labels[labels.isin(shared)])
    expected = np.stack(list(whole["logits"]))[:, [classes.index(name) for name in shared]]
    assert np.array_equal(np.stack(list(table["logits"])), expected)
    assert [metrics.name for metrics in found.per_class] == list(shared)


def test_a_champion_knows_a_class_by_the_name_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers for `square` and `disc`; the data call the second one `circle` since."""
    table = pd.DataFrame(
        [(f"{label}/{n}.png", label, f"{n}", f"{n}", "test") for n, label in enumerate(("circle", "square", "circle"))],
        columns=["path", "label", "sha256", "picture", "split"],
    )
    table.to_parquet(tmp_path / "splits.parquet")
    splits = Splits(
        data=DataVersion(dvc_hash="d", num_files=3, bytes=3, ledger_sha256="l", renamed=(("disc", "circle"),)),
        table=describe(tmp_path / "splits.parquet", within=tmp_path),
        classes=("circle", "square"),
        counts={"test": 3},
        class_counts={},
        num_duplicate_groups=0,
        test_digest="t",
    )
    preprocessing = Preprocessing(
        channels=1, height=8, width=8, resize_shortest=8, interpolation="bilinear", mean=(0.5,), std=(0.5,)
    )
    engine = Engine(
        name="one",
        target="openvino",
        precision="int8",
        settings={},
        checkpoint_digest="c",
        files=(),
        entry="m",
        preprocessing=preprocessing,
        classes=("square", "disc"),
        embedding_dim=4,
        temperature=1.0,
        runtime="r",
        built_for=(),
        facts={},
    )
    answers = np.array([[0, 9], [9, 0], [8, 0]], np.float32)
    replaced(monkeypatch, lambda images: (answers, np.zeros((3, 4))))
    monkeypatch.setattr(evaluation, "batches", lambda *_, **__: [np.zeros((3, 8, 8, 1), np.uint8)])
    common: Any = (Stored(engine, tmp_path), Stored(splits, tmp_path), tmp_path, Task(), CONFIG)
    found = evaluate(*common, out=tmp_path, renamed=splits.data.renamed)
    assert [metrics.name for metrics in found.per_class] == ["circle", "square"]
    assert found.num_images == 3
    assert found.metrics["accuracy"].value == pytest.approx(2 / 3)
    kept = pd.read_parquet(tmp_path / "predictions.parquet")
    assert np.array_equal(np.stack(list(kept["logits"])), answers[:, ::-1])
    assert evaluate(*common, out=tmp_path).status == "not comparable"


@pytest.mark.parametrize("classes", [("cross", "square", "ring"), ("line", "square", "ring")])
def test_a_champion_that_shares_no_two_classes_is_not_scored(
    trained: Path, tmp_path: Path, classes: tuple[str, ...]
) -> None:
    engine = stored(trained, "export/openvino-int8", Engine)
    found = run(trained, tmp_path / "out", Stored(engine.record.model_copy(update={"classes": classes}), engine.folder))
    assert (found.status, found.predictions) == ("not comparable", None)
    assert "cross, disc, stripes) share " + ("only 'cross'" if "cross" in classes else "none") in found.reason


def test_a_champion_whose_target_is_gone_is_said_so(trained: Path, tmp_path: Path) -> None:
    engine = stored(trained, "export/openvino-int8", Engine)
    found = run(trained, tmp_path / "out", Stored(engine.record.model_copy(update={"target": "mine"}), engine.folder))
    assert found.status == "not executed here"
    assert "unknown target 'mine'" in found.reason
