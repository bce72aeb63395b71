"""The tables behind evaluations: what an engine answered, image by image, verified against the digests of its record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from components.contracts.errors import TamperedArtefact
from components.contracts.families import Answers, Corrupted, Slices, Task
from components.contracts.records import FileDigest, Stored
from components.contracts.verdicts import Evaluation, Robustness, SliceTable
from components.store import sha256_file
from components.tables import read_frame

if TYPE_CHECKING:
    import pandas as pd


def beyond_test_of(evaluation: Stored[Evaluation] | None, task: Task) -> Answers | None:
    """What an engine answered on the valid and calibration images; raises TamperedArtefact."""
    if evaluation is None or evaluation.record.beyond_test is None:
        return None
    frame = _unchanged(evaluation.folder, evaluation.record.beyond_test, ["sha256", "logits"])
    return Answers(tuple(frame["sha256"]), (), np.stack(list(frame["logits"])).astype(np.float32), (), task)


def slices_of(slices: Stored[SliceTable] | None) -> Slices | None:
    """The slices that a table holds; raises TamperedArtefact."""
    if slices is None:
        return None
    record = slices.record
    frame = _unchanged(slices.folder, record.table, ["sha256", *record.kinds])
    # Two files of the same bytes are one image in the same slices.
    frame = frame.drop_duplicates("sha256")
    return Slices(tuple(frame["sha256"]), {kind: tuple(frame[kind]) for kind in record.kinds}, record.notes)


def _unchanged(folder: Path, file: FileDigest, columns: list[str]) -> pd.DataFrame:
    path = folder / file.name
    if sha256_file(path) != file.sha256:
        raise TamperedArtefact(f"{path} was changed after it was evaluated; run again to make it anew")
    return read_frame(path, columns)


def answers_of(evaluation: Stored[Evaluation] | None, classes: tuple[str, ...], task: Task) -> Answers | None:
    """The answers behind an evaluation, whose logits are over `classes`; raises TamperedArtefact."""
    if evaluation is None or evaluation.record.predictions is None:
        return None
    frame = _unchanged(evaluation.folder, evaluation.record.predictions, ["sha256", "label", "logits"])
    return _of_frame(frame, classes, task, evaluation.folder / evaluation.record.predictions.name)


def corrupted_of(stored: Stored[Robustness], classes: tuple[str, ...], task: Task) -> Corrupted:
    """The answers on corrupted images behind a record, whose logits are over `classes`; raises TamperedArtefact."""
    record = stored.record
    if record.answers is None:
        return Corrupted({}, record.reason or record.status)
    frame = _unchanged(stored.folder, record.answers, ["sha256", "label", "variant", "logits"])
    path = stored.folder / record.answers.name
    by_variant = frame.groupby("variant", sort=False)
    return Corrupted({str(variant): _of_frame(rows, classes, task, path) for variant, rows in by_variant})


def _of_frame(frame: pd.DataFrame, classes: tuple[str, ...], task: Task, path: Path) -> Answers:
    logits = np.stack(list(frame["logits"])).astype(np.float32)
    if logits.shape[1] != len(classes):
        raise TamperedArtefact(f"{path} has logits of {logits.shape[1]} classes, expected {len(classes)}; run again")
    return Answers(tuple(frame["sha256"]), tuple(frame["label"]), logits, classes, task)
