"""Evaluation: Engine x Splits.test -> Evaluation, in the engine's own runtime; and Measurement of its latency.

An Evaluation is a function of its inputs. A Measurement belongs to the machine it was taken on and is never used on
another one. An engine that cannot run here gets the status `not executed here`, never a pass.

A champion may know other classes than today's data. It is asked about the test images of the classes that both know, and its
answers are chosen among these classes alone, matched by their names of today; one that shares fewer than two of them is
`not comparable`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field, field_validator

from components.contracts.data import Renames, SplitName, Splits, names_after
from components.contracts.errors import DataError, EngineUnavailable
from components.contracts.families import Predictor, Task
from components.contracts.models import Engine
from components.contracts.progress import Progress, silent
from components.contracts.records import FileDigest, Record, Stored, canonical_json, sha256_text
from components.contracts.verdicts import Evaluation, FoldEstimate, Measurement, shared_classes
from components.images import batches
from components.intervals import rounds_percentile
from components.machine import fingerprint
from components.predictors import check_shapes, load
from components.samples import rows
from components.store import describe
from components.tables import read_frame

PREDICTIONS = "predictions.parquet"
BEYOND_TEST = "beyond_test.parquet"
_BATCH = 32
_ROUNDS = 5
_ATTEMPTS = 2


class EvaluationConfig(Record):
    """How engines are measured; how they are evaluated is not a matter of taste."""

    latency_runs: int = Field(default=300, ge=20)
    """Timed single-image calls; a p99 rests on the slowest hundredth of them."""
    latency_warmup_runs: int = Field(default=30, ge=0)
    num_threads: int = Field(default=2, ge=1, le=256)
    folds: int = Field(default=0, ge=0, le=20)
    """Estimates the recipe by that many more trainings, for which all images take turns as test images; 0 for none."""
    robustness_images: int = Field(default=300, ge=0)
    """At most so many test images are shown corrupted as well, see components/robustness.py; 0 for none."""

    @field_validator("folds")
    @classmethod
    def _several(cls, value: int) -> int:
        if value == 1:
            raise ValueError("one fold leaves nothing to train on; expected 0 for none, or 2 to 20")
        return value


def evaluate(
    engine: Stored[Engine],
    splits: Stored[Splits],
    data: Path,
    task: Task,
    config: EvaluationConfig,
    *,
    out: Path,
    renamed: Renames = (),
    beyond_test: bool = False,
    split: SplitName = "test",
    progress: Progress = silent,
) -> Evaluation:
    """Answer every test image and score the answers; writes predictions.parquet (one row an image).

    With another `split` it is that one's images, and no test image is read: engines may be compared before they are judged.

    With `beyond_test` the valid and calibration images are answered as well, and their logits written to
    beyond_test.parquet: nothing is scored on them.

    Logits of that table are over the classes that the data and the engine share, in the data's order. Classes that were
    `renamed` since the engine was trained count under the names that they have now.
    """
    record = engine.record
    common: dict[str, Any] = {
        "engine": record.name,
        "engine_digest": record.digest(),
        "test_digest": _digest(splits, split),
    }
    ours = task.classes(splits.record.classes)
    known = names_after(record.classes, renamed)
    classes = shared_classes(ours, known)
    if len(classes) < 2:
        # Among one class every answer is right, whoever gives it.
        shared = f"only {classes[0]!r}" if classes else "none"
        reason = f"of its classes ({', '.join(known)}) the data ({', '.join(ours)}) share {shared}"
        return Evaluation(**common, status="not comparable", reason=reason)
    table = rows(splits, split)
    if len(table) == 0:
        return Evaluation(**common, status="not executed here", reason=f"the {split} split is empty")
    table = table[task.concerns(list(table["label"]), classes)].reset_index(drop=True)
    if len(table) == 0:
        reason = f"the {split} split holds no image of the classes that it shares with the data ({', '.join(classes)})"
        return Evaluation(**common, status="not comparable", reason=reason)
    try:
        predictor = load(engine, config.num_threads)
    except EngineUnavailable as error:
        return Evaluation(**common, status="not executed here", reason=str(error))
    others = pd.concat([rows(splits, name) for name in ("valid", "calibration")]) if beyond_test else table.iloc[:0]
    paths = [data / path for path in [*table["path"], *others["path"]]]
    answers = [
        predictor.predict(batch) for batch in batches(paths, record.preprocessing, batch_size=_BATCH, progress=progress)
    ]
    logits = np.concatenate([answer[0] for answer in answers]).astype(np.float32)
    embedding = np.concatenate([answer[1] for answer in answers])
    check_shapes(record, len(paths), logits, embedding)
    common["beyond_test"] = _write_beyond_test(others, logits[len(table) :], out) if len(others) else None
    logits, embedding = task.select(logits[: len(table)], known, classes), embedding[: len(table)]
    targets = task.targets(list(table["label"]), classes)
    if not np.isfinite(logits).all():
        # Kept as evidence: the gates call it inconclusive, and a person can see which images it was.
        _write(table, logits, embedding, out)
        bad = int((~np.isfinite(logits).all(axis=1)).sum())
        reason = f"its logits on {bad} of {len(table)} {split} images are not finite numbers"
        return Evaluation(**common, status="evaluated", reason=reason)
    readings = task.read(task.probabilities(logits, record.temperature), classes)
    _write(
        table.assign(
            predicted=[reading.label for reading in readings],
            confidence=np.array([reading.confidence for reading in readings], dtype=np.float32),
            right=task.right(logits, targets),
        ),
        logits,
        embedding,
        out,
    )
    return Evaluation(
        **common,
        status="evaluated",
        num_images=len(table),
        metrics=task.metrics(logits, targets, record.temperature),
        per_class=task.per_class(logits, targets, classes),
        confusion=task.confusion(logits, targets, len(classes)),
        reliability=task.reliability(logits, targets, record.temperature),
        predictions=describe(out / PREDICTIONS, within=out),
    )


def pooled(folds: Sequence[tuple[Engine, Stored[Evaluation]]], task: Task, classes: Sequence[str]) -> FoldEstimate:
    """The estimate of a recipe from the engines of its folds, each of which answered other images.

    Raises DataError where a fold gave no answers that are finite numbers.
    """
    answered = []
    for number, (engine, evaluation) in enumerate(folds, 1):
        record = evaluation.record
        if record.predictions is None or record.reason or record.engine_digest != engine.digest():
            raise DataError(f"fold {number} of {len(folds)} has no answers: {record.reason or record.status}")
        answered.append(read_frame(evaluation.folder / record.predictions.name, ["label", "logits"]))
    names = task.classes(classes)
    # The temperature of each fold is that of its own model, so calibration is judged as it would be used.
    logits = np.concatenate(
        [np.stack(list(table["logits"])) / engine.temperature for table, (engine, _) in zip(answered, folds, strict=True)]
    ).astype(np.float32)
    targets = task.targets([label for table in answered for label in table["label"]], names)
    return FoldEstimate(
        folds=len(folds),
        num_images=len(logits),
        metrics=task.metrics(logits, targets, 1.0),
        per_class=task.per_class(logits, targets, names),
        by_fold=tuple(evaluation.record.metrics[task.headline] for _, evaluation in folds),
    )


def _digest(splits: Stored[Splits], split: SplitName) -> str:
    """Names the images of a split and their labels."""
    if split == "test":
        return splits.record.test_digest
    table = rows(splits, split)
    return sha256_text(canonical_json([list(splits.record.classes), *zip(table["sha256"], table["label"], strict=True)]))


def _write(table: pd.DataFrame, logits: npt.NDArray[np.float32], embedding: npt.NDArray[Any], out: Path) -> None:
    """Rows with sha256, path and label, and with predicted, confidence and right where the answers are finite."""
    columns = [name for name in ("sha256", "path", "label", "predicted", "confidence", "right") if name in table]
    frame = table[columns].assign(logits=list(logits), embedding=list(embedding.astype(np.float16)))
    frame.to_parquet(out / PREDICTIONS, index=False)


def _write_beyond_test(table: pd.DataFrame, logits: npt.NDArray[np.float32], out: Path) -> FileDigest:
    table[["sha256"]].assign(logits=list(logits)).to_parquet(out / BEYOND_TEST, index=False)
    return describe(out / BEYOND_TEST, within=out)


def measure(
    engines: Sequence[Stored[Engine]],
    splits: Stored[Splits],
    data: Path,
    config: EvaluationConfig,
    *,
    split: SplitName = "test",
    progress: Progress = silent,
) -> list[Measurement]:
    """Time single decoded images of a split through engines: whole answers, without decoding and network; in their order.

    The engines take turns, a round each, so a noisy moment meets all of them; percentiles are the medians over the rounds.
    What is noisy all the same is measured once more, and the attempt whose rounds agree best counts.
    """
    predictors: dict[int, Predictor] = {}
    found: dict[int, Measurement] = {}
    for place, engine in enumerate(engines):
        try:
            predictors[place] = load(engine, config.num_threads)
        except EngineUnavailable as error:
            found[place] = _measured(engine.record, status="not executed here", reason=str(error))
    paths = [data / path for path in rows(splits, split)["path"].head(32)]
    images = {
        place: np.concatenate(list(batches(paths, engines[place].record.preprocessing, batch_size=_BATCH)))
        for place in predictors
    }
    for attempt in range(1, _ATTEMPTS + 1):
        wanted = [place for place in predictors if place not in found or found[place].noisy]
        elapsed: dict[int, list[npt.NDArray[np.float64]]] = {place: [] for place in wanted}
        for turn in range(_ROUNDS):
            for position, place in enumerate(wanted):
                elapsed[place].append(_round(predictors[place], images[place], config))
                progress(turn * len(wanted) + position + 1, _ROUNDS * len(wanted))
        for place in wanted:
            measured = summarised(engines[place].record, elapsed[place], config, num_attempts=attempt)
            before = found.get(place)
            if before is not None and before.spread < measured.spread:
                measured = before.model_copy(update={"num_attempts": attempt})
            found[place] = measured
    return [found[place] for place in range(len(engines))]


def _round(predictor: Predictor, images: npt.NDArray[Any], config: EvaluationConfig) -> npt.NDArray[np.float64]:
    """Seconds of each timed call of one round, after its share of the warm-up."""
    timed = -(-config.latency_runs // _ROUNDS)
    elapsed = np.empty(timed)
    for run in range(-max(1, config.latency_warmup_runs // _ROUNDS), timed):
        image = images[run % len(images)][None]
        start = time.perf_counter()
        predictor.predict(image)
        if run >= 0:
            elapsed[run] = time.perf_counter() - start
    return elapsed


def summarised(
    engine: Engine, elapsed: Sequence[npt.NDArray[np.float64]], config: EvaluationConfig, *, num_attempts: int = 1
) -> Measurement:
    """The measurement of an engine from the seconds of its rounds: medians over the rounds of each percentile."""
    rounds = np.array([np.percentile(seconds * 1e3, [50, 90, 99]) for seconds in elapsed])
    p50, p90, p99 = (float(value) for value in np.median(rounds, axis=0))
    return _measured(
        engine,
        status="measured",
        num_threads=config.num_threads,
        num_runs=sum(len(seconds) for seconds in elapsed),
        latency_p50_ms=p50,
        latency_p90_ms=p90,
        latency_p99_ms=p99,
        latency_p99=rounds_percentile([seconds * 1e3 for seconds in elapsed], 99),
        rounds_p50_ms=tuple(float(value) for value in rounds[:, 0]),
        rounds_p99_ms=tuple(float(value) for value in rounds[:, 2]),
        num_attempts=num_attempts,
    )


def _measured(engine: Engine, **facts: Any) -> Measurement:
    return Measurement(
        engine=engine.name, engine_digest=engine.digest(), machine=fingerprint(), size_bytes=engine.size_bytes, **facts
    )
