"""A window of the prediction log: the rows of one release between two moments, each once, whole or told about."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from components.contracts.families import Task
from components.contracts.records import sha256_text
from components.contracts.releases import Release
from components.images import STATISTICS
from components.predictionlog import Stretch
from monitoring.verdicts import Sample, WindowFacts, columns_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

_EMPTY_DIGEST = sha256_text("")


@dataclass(frozen=True)
class Window:
    """Rows of one release, ready to be compared."""

    facts: WindowFacts
    sample: Sample
    frame: pd.DataFrame
    """The judged rows: prediction_id, image_sha256, ingest_at, predicted, confidence, unsure; aligned with `sample`."""


def open_window(
    log: Stretch,
    release: Release,
    task: Task,
    digest: str,
    version: str,
    *,
    since: datetime.datetime,
    until: datetime.datetime,
    most: int,
) -> Window:
    """The window [since, until) of a release as its task reads it: at most `most` of its images, drawn by their digests.

    Order and repetition of rows change nothing. Rows without finite answers are counted, never compared; an image that was
    asked again and again is compared once: the same answer many times is no more evidence than once.
    """
    import pandas as pd

    frames = [_frame(table) for table in log.tables if len(table)]
    everything = pd.concat(frames, ignore_index=True) if frames else _frame(None)
    mine = everything[(everything["ingest_at"] >= since) & (everything["ingest_at"] < until)]
    num_rows = len(mine)
    mine = mine.drop_duplicates("prediction_id")
    duplicates = num_rows - len(mine)
    own = mine[mine["release"] == digest].sort_values("prediction_id", ignore_index=True)
    engine = release.engine
    width = task.width(engine.classes)
    whole = _whole(own, width, engine.embedding_dim)
    kept = own[whole].drop_duplicates("image_sha256").reset_index(drop=True)
    distinct = len(kept)
    if distinct > most:
        # By the digests themselves: the same images, whatever else is in the log.
        kept = kept.loc[kept["image_sha256"].sort_values().index[:most]].sort_index().reset_index(drop=True)
    facts = WindowFacts(
        model=release.model,
        version=version,
        release=digest,
        since=since.isoformat(),
        until=until.isoformat(),
        rows=len(own),
        judged=len(kept),
        distinct_images=distinct,
        duplicates=duplicates,
        malformed=int((~whole).sum()),
        other_releases=len(mine) - len(own),
        lost=log.lost,
        problems=log.problems,
        content=_content(own["prediction_id"]),
    )
    return Window(facts, _sample(kept, release, task, width), kept.drop(columns=["embedding", "probabilities"]))


def _content(ids: Iterable[str]) -> str:
    found = hashlib.sha256()
    for identifier in sorted(ids):
        found.update(identifier.encode())
    return found.hexdigest()


_COLUMNS = ("prediction_id", "image_sha256", "release", "ingest_at", "predicted", "confidence", "unsure")


def _frame(table: pa.Table | None) -> pd.DataFrame:
    import pandas as pd

    names = [*_COLUMNS, *STATISTICS, "probabilities", "embedding"]
    if table is None:
        empty = pd.DataFrame({name: pd.Series(dtype=object) for name in names})
        return empty.assign(ingest_at=pd.to_datetime(empty["ingest_at"], utc=True))
    frame = pd.DataFrame({name: table[name].to_pandas(use_threads=False) for name in names if name in table.column_names})
    for name in names:
        if name not in frame:
            frame[name] = None  # a log of an older schema
    return frame.assign(ingest_at=pd.to_datetime(frame["ingest_at"], utc=True))


def _whole(frame: pd.DataFrame, width: int, embedding_dim: int) -> npt.NDArray[np.bool_]:
    def fits(values: Any, length: int) -> bool:
        # numpy of objects where the log holds nulls: those are not finite answers.
        if values is None or not hasattr(values, "__len__") or len(values) != length:
            return False
        return bool(np.isfinite(np.asarray(values, dtype=np.float32)).all())

    right = [
        fits(probabilities, width) and fits(embedding, embedding_dim)
        for probabilities, embedding in zip(frame["probabilities"], frame["embedding"], strict=True)
    ]
    numbers = frame[["confidence", *STATISTICS]].astype("float64").to_numpy()
    found: npt.NDArray[np.bool_] = np.array(right, dtype=bool) & np.isfinite(numbers).all(axis=1)
    return found


def _sample(frame: pd.DataFrame, release: Release, task: Task, width: int) -> Sample:
    engine = release.engine
    probabilities = np.concatenate([np.asarray(row, np.float64) for row in frame["probabilities"]] or [np.zeros(0)])
    embeddings = np.concatenate([np.asarray(row, np.float32) for row in frame["embedding"]] or [np.zeros(0, np.float32)])
    return Sample(
        statistics=frame[list(STATISTICS)].to_numpy(dtype=np.float64),
        columns=columns_of(task, probabilities.reshape(-1, width), engine.classes),
        embeddings=embeddings.reshape(-1, engine.embedding_dim),
        classes=engine.classes,
    )
