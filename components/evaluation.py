"""Evaluation: Engine x Splits.test -> Evaluation, in the engine's own runtime; and Measurement of its latency.

An Evaluation is a function of its inputs. A Measurement belongs to the machine it was taken on and is never used on
another one. An engine that cannot run here gets the status `not executed here`, never a pass.

A champion may know other classes than today's data. It is asked about the test images of the classes that both know, and its
answers are chosen among these classes alone, matched by name; one that shares fewer than two of them is `not comparable`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from components import plugins
from components.contracts import (
    ConfigError,
    Engine,
    EngineUnavailable,
    Evaluation,
    Measurement,
    Predictor,
    Progress,
    Record,
    Splits,
    Stored,
    shared_classes,
    silent,
)
from components.images import batches
from components.machine import fingerprint
from components.samples import rows
from components.store import describe

if TYPE_CHECKING:
    import pandas as pd

PREDICTIONS = "predictions.parquet"
_BATCH = 32


class EvaluationConfig(Record):
    """How engines are measured; how they are evaluated is not a matter of taste."""

    latency_runs: int = Field(default=300, ge=20)
    """Timed single-image calls; a p99 rests on the slowest hundredth of them."""
    latency_warmup_runs: int = Field(default=30, ge=0)
    num_threads: int = Field(default=2, ge=1, le=256)


def evaluate(
    engine: Stored[Engine],
    splits: Stored[Splits],
    data: Path,
    task: Any,
    config: EvaluationConfig,
    *,
    out: Path,
    progress: Progress = silent,
) -> Evaluation:
    """Answer every test image and score the answers; writes predictions.parquet (one row an image).

    Labels and logits of that table are over the classes that the data and the engine share, in the data's order.
    """
    record = engine.record
    common: dict[str, Any] = {
        "engine": record.name,
        "engine_digest": record.digest(),
        "test_digest": splits.record.test_digest,
    }
    classes = shared_classes(splits.record.classes, record.classes)
    if len(classes) < 2:
        # Among one class every answer is right, whoever gives it.
        shared = f"only {classes[0]!r}" if classes else "none"
        reason = f"of its classes ({', '.join(record.classes)}) the data ({', '.join(splits.record.classes)}) share {shared}"
        return Evaluation(**common, status="not comparable", reason=reason)
    table = rows(splits, "test")
    if len(table) == 0:
        return Evaluation(**common, status="not executed here", reason="the test split is empty")
    table = table[table["label"].isin(classes)].reset_index(drop=True)
    if len(table) == 0:
        reason = f"the test split holds no image of the classes that it shares with the data ({', '.join(classes)})"
        return Evaluation(**common, status="not comparable", reason=reason)
    try:
        predictor = _load(engine, config.num_threads)
    except EngineUnavailable as error:
        return Evaluation(**common, status="not executed here", reason=str(error))
    paths = [data / path for path in table["path"]]
    answers = [
        predictor.predict(batch) for batch in batches(paths, record.preprocessing, batch_size=_BATCH, progress=progress)
    ]
    logits = np.concatenate([answer[0] for answer in answers]).astype(np.float32)
    embedding = np.concatenate([answer[1] for answer in answers])
    _check_shapes(record, len(table), logits, embedding)
    logits = logits[:, [record.classes.index(name) for name in classes]]
    labels = np.array([classes.index(name) for name in table["label"]], dtype=np.int64)
    if not np.isfinite(logits).all():
        # Kept as evidence: the gates call it inconclusive, and a person can see which images it was.
        _write(table, labels, logits, embedding, np.full_like(logits, np.nan, dtype=np.float64), out)
        bad = int((~np.isfinite(logits).all(axis=1)).sum())
        reason = f"its logits on {bad} of {len(table)} test images are not finite numbers"
        return Evaluation(**common, status="evaluated", reason=reason)
    predicted = logits.argmax(axis=1)
    _write(table, labels, logits, embedding, task.probabilities(logits, record.temperature), out)
    matrix = task.confusion(predicted, labels, len(classes))
    return Evaluation(
        **common,
        status="evaluated",
        num_images=len(table),
        metrics=task.metrics(logits, labels, record.temperature),
        per_class=task.per_class(predicted, labels, classes),
        confusion=tuple(tuple(int(count) for count in row) for row in matrix),
        reliability=task.reliability(logits, labels, record.temperature),
        predictions=describe(out / PREDICTIONS, within=out),
    )


def _load(engine: Stored[Engine], num_threads: int) -> Predictor:
    try:
        target = plugins.load("targets", engine.record.target, engine.record.settings)
    except ConfigError as error:
        # An older engine, whose plug-in was removed since or takes other settings now.
        raise EngineUnavailable(str(error)) from error
    predictor: Predictor = target.load(engine, num_threads=num_threads)
    return predictor


def _check_shapes(engine: Engine, n: int, logits: npt.NDArray[Any], embedding: npt.NDArray[Any]) -> None:
    expected = ((n, len(engine.classes)), (n, engine.embedding_dim))
    if (logits.shape, embedding.shape) != expected:
        raise EngineUnavailable(
            f"{engine.name} answered logits {logits.shape} and embedding {embedding.shape}, expected {expected[0]} and "
            f"{expected[1]}; the file does not belong to this label space"
        )


def _write(
    table: pd.DataFrame,
    labels: npt.NDArray[np.int64],
    logits: npt.NDArray[np.float32],
    embedding: npt.NDArray[Any],
    probabilities: npt.NDArray[np.float64],
    out: Path,
) -> None:
    import pandas as pd

    predicted = logits.argmax(axis=1)
    frame = pd.DataFrame(
        {
            "sha256": table["sha256"],
            "path": table["path"],
            "label": labels,
            "predicted": predicted,
            "confidence": probabilities.max(axis=1).astype(np.float32),
            "logits": list(logits),
            "embedding": list(embedding.astype(np.float16)),
        }
    )
    frame.to_parquet(out / PREDICTIONS, index=False)


def measure(
    engine: Stored[Engine], splits: Stored[Splits], data: Path, config: EvaluationConfig, *, progress: Progress = silent
) -> Measurement:
    """Time single decoded test images through the engine: a whole answer, without decoding and network."""
    record = engine.record
    common: dict[str, Any] = {
        "engine": record.name,
        "engine_digest": record.digest(),
        "machine": fingerprint(),
        "size_bytes": record.size_bytes,
    }
    try:
        predictor = _load(engine, config.num_threads)
    except EngineUnavailable as error:
        return Measurement(**common, status="not executed here", reason=str(error))
    paths = [data / path for path in rows(splits, "test")["path"].head(32)]
    images = np.concatenate(list(batches(paths, record.preprocessing, batch_size=_BATCH)))
    elapsed = np.empty(config.latency_runs)
    for run in range(-config.latency_warmup_runs, config.latency_runs):
        image = images[run % len(images)][None]
        start = time.perf_counter()
        predictor.predict(image)
        if run >= 0:
            elapsed[run] = time.perf_counter() - start
        progress(run + config.latency_warmup_runs + 1, config.latency_runs + config.latency_warmup_runs)
    p50, p90, p99 = (float(value) for value in np.percentile(elapsed * 1e3, [50, 90, 99]))
    return Measurement(
        **common,
        status="measured",
        num_threads=config.num_threads,
        num_runs=config.latency_runs,
        latency_p50_ms=p50,
        latency_p90_ms=p90,
        latency_p99_ms=p99,
    )
