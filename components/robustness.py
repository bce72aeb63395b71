"""Robustness: Engine x Splits.test -> Robustness: what it answers where the camera is worse, on the same pictures each time.

Some hundred test images, chosen by their digests, are prepared once and shown as they are, corrupted and otherwise
(components/corruptions.py). Candidate and champion are asked about the same ones, and a test set that grows keeps most of
them. Nothing is trained or chosen by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from components.calibration import stratified
from components.contracts.data import Renames, Splits, names_after
from components.contracts.errors import EngineUnavailable
from components.contracts.families import Predictor, Task
from components.contracts.models import Engine
from components.contracts.progress import Progress, silent
from components.contracts.records import Stored
from components.contracts.verdicts import Robustness, shared_classes
from components.corruptions import BEHAVIOURS, CLEAN, CORRUPTED, VARIANTS, changed
from components.images import batches, in_threads
from components.intervals import mean_interval, wilson
from components.predictors import check_shapes, load
from components.samples import rows
from components.store import describe

ANSWERS = "corrupted.parquet"
_BATCH = 32


def chosen(splits: Stored[Splits], task: Task, most: int) -> pd.DataFrame:
    """At most so many rows of the test split, the task's strata in their shares; the same for whoever is asked."""
    return stratified(rows(splits, "test"), task).head(most)


def answer_corrupted(
    engine: Stored[Engine],
    splits: Stored[Splits],
    data: Path,
    task: Task,
    *,
    num_images: int,
    num_threads: int,
    out: Path,
    renamed: Renames = (),
    progress: Progress = silent,
) -> Robustness:
    """Answer at most `num_images` test images in every variant; writes corrupted.parquet, a row for each answer.

    As in evaluation, an engine that knows other classes is asked about images of the classes that it shares with the data,
    and its answers are chosen among these, under the names that they have now.
    """
    record = engine.record
    common: dict[str, Any] = {
        "engine": record.name,
        "engine_digest": record.digest(),
        "test_digest": splits.record.test_digest,
    }
    known = names_after(record.classes, renamed)
    classes = shared_classes(task.classes(splits.record.classes), known)
    table = chosen(splits, task, num_images)
    if len(table):
        table = table[task.concerns(list(table["label"]), classes)].reset_index(drop=True)
    if len(classes) < 2 or len(table) == 0:
        reason = f"no test image is left to be corrupted of the classes that it shares with the data ({', '.join(classes)})"
        return Robustness(**common, status="not comparable", reason=reason)
    try:
        predictor = load(engine, num_threads)
    except EngineUnavailable as error:
        return Robustness(**common, status="not executed here", reason=str(error))
    answers = _answers(predictor, record, table, data, progress)
    logits = {variant: task.select(answers[variant], known, classes) for variant in VARIANTS}
    common |= {"status": "evaluated", "num_images": len(table)}
    bad = sum(int((~np.isfinite(found).all(axis=1)).sum()) for found in logits.values())
    if bad:
        # Kept as evidence: the gate calls it inconclusive.
        reason = f"its logits on {bad} of {len(table) * len(VARIANTS)} changed test images are not finite numbers"
        _write(table, logits, {}, out)
        return Robustness(**common, reason=reason, answers=describe(out / ANSWERS, within=out))
    targets = task.targets(list(table["label"]), classes)
    right = {variant: task.right(logits[variant], targets) for variant in VARIANTS}
    _write(table, logits, right, out)
    scores = np.mean([right[variant] for variant in CORRUPTED], axis=0)
    return Robustness(
        **common,
        corrupted=mean_interval(float(scores.mean()), float(scores.var()), len(scores)),
        right={variant: wilson(int(found.sum()), len(table)) for variant, found in right.items()},
        unchanged={
            variant: wilson(int(task.agree(logits[variant], logits[CLEAN]).sum()), len(table)) for variant in BEHAVIOURS
        },
        answers=describe(out / ANSWERS, within=out),
    )


def _answers(
    predictor: Predictor, engine: Engine, table: pd.DataFrame, data: Path, progress: Progress
) -> dict[str, npt.NDArray[np.float32]]:
    """Logits (n, classes) by variant. The next variants are made in two threads while the engine answers one."""
    found: dict[str, list[npt.NDArray[np.float32]]] = {variant: [] for variant in VARIANTS}
    done, total = 0, len(table) * len(VARIANTS)
    for pictures, digests in _prepared(table, data, engine):

        def shown(
            variant: str, pictures: npt.NDArray[np.uint8] = pictures, digests: list[str] = digests
        ) -> npt.NDArray[np.uint8]:
            return changed(pictures, variant, digests)

        for variant, images in zip(VARIANTS, in_threads(shown, VARIANTS), strict=True):
            logits, embedding = predictor.predict(images)
            check_shapes(engine, len(images), logits, embedding)
            found[variant].append(logits.astype(np.float32))
            done += len(images)
            progress(done, total)
    return {variant: np.concatenate(parts) for variant, parts in found.items()}


def _prepared(table: pd.DataFrame, data: Path, engine: Engine) -> Iterator[tuple[npt.NDArray[np.uint8], list[str]]]:
    """Batches of prepared pictures and their digests; each file is decoded once for all variants."""
    paths, digests = [data / path for path in table["path"]], list(table["picture"])
    place = 0
    for pictures in batches(paths, engine.preprocessing, batch_size=_BATCH):
        yield pictures, digests[place : place + len(pictures)]
        place += len(pictures)


def _write(
    table: pd.DataFrame,
    logits: dict[str, npt.NDArray[np.float32]],
    right: dict[str, npt.NDArray[np.bool_]],
    out: Path,
) -> None:
    """Rows with sha256, label, variant and logits, and with `right` where all answers are finite."""
    parts = []
    for variant, found in logits.items():
        part = table[["sha256", "label"]].assign(variant=variant, logits=list(found))
        parts.append(part.assign(right=right[variant]) if right else part)
    pd.concat(parts).to_parquet(out / ANSWERS, index=False)
