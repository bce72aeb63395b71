"""Predictions without a server: samples, a release that describes them, and rows of the log."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from components import plugins
from components.contracts.families import Task
from components.contracts.models import Engine, Preprocessing
from components.contracts.records import FileDigest, Stored
from components.contracts.releases import DecisionRule, Release
from components.contracts.verdicts import Estimate
from components.images import STATISTICS
from components.predictionlog import schema
from components.store import describe
from monitoring.verdicts import Sample

CLASSES = tuple("0123456789")
TASK: Task = plugins.load("tasks", "classification")
DIM = 16
START = datetime.datetime(2026, 3, 1, 12, 0, tzinfo=datetime.UTC)
END = START + datetime.timedelta(minutes=15)


def sample(n: int, seed: int, *, shift: float = 0.0, dim: int = DIM, grey: bool = True) -> Sample:
    """Answers on n images; `shift` moves brightness, confidence and the embeddings, in standard deviations."""
    rng = np.random.default_rng(seed)
    statistics = rng.normal([0.4 + 0.05 * shift, 0.5, 0.2, 0.0], [0.05, 0.05, 0.03, 0.0 if grey else 0.05], (n, 4))
    return Sample(
        statistics=statistics.astype(np.float64),
        columns={
            "confidence": np.clip(rng.normal(0.9 - 0.03 * shift, 0.03, n), 0, 1),
            "predicted": np.array(CLASSES)[rng.integers(0, len(CLASSES), n)],
        },
        embeddings=rng.normal(shift, 1.0, (n, dim)).astype(np.float32),
        classes=CLASSES,
    )


def changed(given: Sample, **columns: npt.NDArray[Any]) -> Sample:
    """The sample with other confidences or predictions."""
    return dataclasses.replace(given, columns={**given.columns, **columns})


def reference_file(path: Path, given: Sample) -> FileDigest:
    """The sample as packaging writes it."""
    n = len(given)
    frame = pd.DataFrame(
        {
            "image_sha256": [sha(f"reference {i}") for i in range(n)],
            "split": "test",
            "label": given.columns["predicted"],
            "predicted": given.columns["predicted"],
            "confidence": given.columns["confidence"].astype(np.float32),
            "probabilities": list(probabilities(given)),
            "embedding": list(given.embeddings.astype(np.float16)),
            **{name: given.statistics[:, index].astype(np.float32) for index, name in enumerate(STATISTICS)},
        }
    )
    frame.to_parquet(path, index=False)
    return describe(path, within=path.parent)


def release(folder: Path, given: Sample | None = None, *, dim: int = DIM) -> Stored[Release]:
    """A release whose reference is `given`; nothing executes its engine."""
    folder.mkdir(parents=True, exist_ok=True)
    file = reference_file(folder / "reference.parquet", given if given is not None else sample(1000, 0))
    share = Estimate(value=1, low=0.9, high=1, n=10, method="wilson")
    size = Preprocessing(channels=1, height=8, width=8, resize_shortest=8, interpolation="bilinear", mean=(0,), std=(1,))
    engine = Engine(
        name="e",
        target="openvino",
        precision="int8",
        settings={},
        checkpoint_digest="c" * 64,
        files=(),
        entry="e",
        preprocessing=size,
        classes=CLASSES,
        embedding_dim=dim,
        temperature=1.0,
        runtime="r",
        built_for=(),
        facts={},
    )
    record = Release(
        model="digits",
        engine=engine,
        task="classification",
        task_settings={},
        decision=DecisionRule(threshold=0.5, target_accuracy=0.99, num_valid=10, coverage=share, accuracy=share),
        reference=file,
        golden=file,
        golden_tolerance=0.1,
    )
    return Stored(record, folder)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def probabilities(given: Sample) -> npt.NDArray[np.float32]:
    found = np.full((len(given), len(CLASSES)), 0.0)
    places = [CLASSES.index(name) for name in given.columns["predicted"]]
    found[np.arange(len(given)), places] = given.columns["confidence"]
    return found.astype(np.float32)


def rows(given: Sample, digest: str, *, at: datetime.datetime = START, name: str = "p", **changes: Any) -> pa.Table:
    """The sample as rows of the log, a second apart and then again from the start of the window."""
    n = len(given)
    moments = [at + datetime.timedelta(seconds=i % 600) for i in range(n)]
    columns: dict[str, Any] = {field.name: [None] * n for field in schema()}
    columns |= {
        "prediction_id": [f"{name}{i:06d}" for i in range(n)],
        "model": ["digits"] * n,
        "version": ["1"] * n,
        "release": [digest] * n,
        "role": ["champion"] * n,
        "image_sha256": [sha(f"{name}{i}") for i in range(n)],
        "predicted": given.columns["predicted"].tolist(),
        "event_at": moments,
        "ingest_at": moments,
        "confidence": given.columns["confidence"],
        "unsure": [False] * n,
        "probabilities": list(probabilities(given)),
        "embedding": list(given.embeddings.astype(np.float16)),
        **{field: given.statistics[:, index] for index, field in enumerate(STATISTICS)},
    }
    columns |= changes
    return pa.table(columns, schema=schema())
