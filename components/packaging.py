"""Packaging: the serving engine -> Release, with all that production needs and nothing else.

The decision rule is fitted on the valid split; the reference sample (what drift is measured against) and the golden
vectors (what a server must answer before it is ready) are the serving engine's own answers on held-out images, never on
training ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from components import plugins
from components.answering import needed
from components.contracts.data import Splits
from components.contracts.errors import ConfigError, UnknownName
from components.contracts.families import Predictor, Task
from components.contracts.models import Engine
from components.contracts.progress import Progress, silent
from components.contracts.records import Record, Stored
from components.contracts.releases import NEVER, CriticalClass, DecisionRule, Release
from components.contracts.verdicts import Estimate, fewest
from components.images import STATISTICS, appearance, decode, in_threads, prepare
from components.int8_arithmetic import int8_arithmetic
from components.intervals import wilson
from components.releases import ENGINE, GOLDEN, INT8_ARITHMETIC, REFERENCE, TOLERANCE
from components.samples import rows
from components.store import describe

if TYPE_CHECKING:
    import pandas as pd

_BATCH = 32
_SEED = 20240717


class PackagingConfig(Record):
    """What accompanies the engine into production."""

    target_accuracy: float = Field(default=0.99, gt=0, le=1)
    """Answers below the confidence at which the valid split's answered images reach this accuracy are "unsure"."""
    min_confidence: float = Field(default=0.5, ge=0, lt=1)
    """The threshold is never lower: images unlike the data's get low confidences that no split can show."""
    reference_images: int = Field(default=2000, ge=50)
    """Most images of the reference sample; taken from test and valid."""
    golden_images: int = Field(default=16, ge=4, le=64)
    critical: dict[str, Annotated[float, Field(gt=0, lt=1)]] = {}
    """Classes that others may seldom be taken for: of the pictures of other classes at most this share may be answered so
    surely. The threshold of such an answer is fitted on valid, by the upper limit of the 95 % interval.

    Left out of JSON where there are none: records are named by digests from before the field."""

    @model_serializer(mode="wrap")
    def _without_the_field(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if not self.critical:
            del values["critical"]
        return values


def expect_critical(config: PackagingConfig, labels: Sequence[str], task: Task) -> None:
    """Raise UnknownName for a critical class that there is not among what the data are labelled with."""
    classes = task.classes(labels)
    for name in config.critical:
        if name not in classes:
            raise UnknownName("class in packaging.critical", name, classes)


def expect_provable(config: PackagingConfig, splits: Splits, task: Task) -> None:
    """Raise UnknownName for a critical class that there is not, ConfigError for a rate that valid cannot prove."""
    expect_critical(config, splits.classes, task)
    for name, rate in config.critical.items():
        counts = splits.class_counts["valid"]
        num_others = sum(count for label, count in counts.items() if name not in task.classes([label]))
        enough = fewest(lambda n, rate=rate: wilson(0, n).high <= rate)  # type: ignore[misc]
        if enough is None or num_others < enough:
            takes = f"it takes {enough}" if enough is not None else "no number of them would do"
            raise ConfigError(
                f"packaging.critical.{name}: that at most {100 * rate:g} % of the pictures of other classes are answered "
                f"{name!r} cannot be proven by {num_others} valid pictures of other classes, even if none is: {takes}. Add "
                f"pictures, raise splitting.valid_share, or allow a higher rate"
            )


def package(
    model: str,
    engine: Stored[Engine],
    splits: Stored[Splits],
    data: Path,
    task: tuple[str, dict[str, Any]],
    config: PackagingConfig,
    *,
    num_threads: int,
    out: Path,
    progress: Progress = silent,
) -> Release:
    """Write the release's folder; `task` is the name and the settings of the task that reads the logits.

    Raises EngineUnavailable where the engine cannot run, and as `expect_provable` does.
    """
    record = engine.record
    reader: Task = plugins.load("tasks", *task)
    expect_provable(config, splits.record, reader)
    predictor: Predictor = plugins.load("targets", record.target, record.settings).load(engine, num_threads=num_threads)
    valid, test = rows(splits, "valid"), rows(splits, "test")
    table = _sample(test, valid, config.reference_images)
    answers = _answers(record, predictor, reader, data, table, progress)
    answers.to_parquet(out / REFERENCE, index=False)
    _write_golden(record, predictor, reader, data, valid if len(valid) else test, config.golden_images, out / GOLDEN)
    for file in record.files:
        copy = out / ENGINE / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(engine.folder / file.name, copy)
    return Release(
        model=model,
        engine=record,
        task=task[0],
        task_settings=task[1],
        decision=rule_of(answers, config, reader),
        reference=describe(out / REFERENCE, within=out),
        golden=describe(out / GOLDEN, within=out),
        golden_tolerance=TOLERANCE[record.precision],
    )


def _sample(test: pd.DataFrame, valid: pd.DataFrame, most: int) -> pd.DataFrame:
    """All of valid, for the rule, and test up to `most` images in all; in a fixed order."""
    import pandas as pd

    room = max(most - len(valid), min(len(test), most // 2))
    if len(test) > room:
        picks = np.sort(np.random.default_rng(_SEED).choice(len(test), size=room, replace=False))
        test = test.iloc[picks]
    return pd.concat([test, valid], ignore_index=True)


def _answers(
    engine: Engine, predictor: Predictor, task: Task, data: Path, table: pd.DataFrame, progress: Progress
) -> pd.DataFrame:
    import pandas as pd

    def read(path: str) -> tuple[npt.NDArray[np.uint8], int, int, int]:
        raw = (data / path).read_bytes()
        picture = decode(raw)
        return prepare(picture, engine.preprocessing), picture.width, picture.height, len(raw)

    pictures = list(in_threads(read, list(table["path"]), progress=progress))
    given, embeddings = [], []
    for start in range(0, len(pictures), _BATCH):
        logits, embedding = predictor.predict(np.stack([picture[0] for picture in pictures[start : start + _BATCH]]))
        given.append(logits)
        embeddings.append(embedding.astype(np.float16))
    embedding = np.concatenate(embeddings)
    probability = task.probabilities(np.concatenate(given), engine.temperature)
    readings = task.read(probability, engine.classes)
    looks = np.array([appearance(picture[0]) for picture in pictures], dtype=np.float32)
    return pd.DataFrame(
        {
            "image_sha256": table["sha256"],
            "split": table["split"],
            "label": table["label"],
            "predicted": [reading.label for reading in readings],
            "confidence": np.array([reading.confidence for reading in readings], dtype=np.float32),
            "right": task.right(np.concatenate(given), task.targets(list(table["label"]), engine.classes)),
            "probabilities": list(probability.astype(np.float32)),
            "embedding": list(embedding),
            "width": np.array([picture[1] for picture in pictures], dtype=np.int32),
            "height": np.array([picture[2] for picture in pictures], dtype=np.int32),
            "bytes": np.array([picture[3] for picture in pictures], dtype=np.int64),
            **{name: looks[:, index] for index, name in enumerate(STATISTICS)},
        }
    )


def _write_golden(
    engine: Engine, predictor: Predictor, task: Task, data: Path, table: pd.DataFrame, count: int, path: Path
) -> None:
    """Encoded pictures and prepared pixels with their answers, the strata taking turns."""
    from safetensors.numpy import save

    strata = table["label"].map(task.stratum)
    chosen = table.assign(stratum=strata, turn=strata.groupby(strata).cumcount())
    chosen = chosen.sort_values(["turn", "stratum"], kind="stable").head(count)
    encoded = [(data / name).read_bytes() for name in chosen["path"]]
    pixels = np.stack([prepare(decode(raw), engine.preprocessing) for raw in encoded])
    logits, embedding = predictor.predict(pixels)
    tensors = {
        "pixels": pixels,
        "probabilities": task.probabilities(logits, engine.temperature).astype(np.float32),
        "embedding": embedding.astype(np.float32),
        **{f"encoded.{index:03d}": np.frombuffer(raw, dtype=np.uint8) for index, raw in enumerate(encoded)},
    }
    arithmetic = int8_arithmetic() if engine.precision == "int8" else ""
    path.write_bytes(save(tensors, metadata={INT8_ARITHMETIC: arithmetic} if arithmetic else None))


def rule_of(answers: pd.DataFrame, config: PackagingConfig, task: Task) -> DecisionRule:
    """Fitted on the answers of valid, told of those of test: label, predicted, confidence, right and split of each.

    Without valid images the threshold is the least that it may be.
    """
    confidence = answers["confidence"].to_numpy(dtype=np.float64)
    correct = answers["right"].to_numpy(dtype=bool)
    valid, test = (answers["split"] == name for name in ("valid", "test"))
    threshold = config.min_confidence
    if valid.any():
        threshold = fit_threshold(confidence[valid], correct[valid], config.target_accuracy, threshold)
    critical = tuple(_critical(answers, name, rate, threshold, task) for name, rate in config.critical.items())
    of_classes = {each.name: each.threshold for each in critical}
    answered = confidence[test] >= answers["predicted"][test].map(lambda label: needed(task, label, threshold, of_classes))
    return DecisionRule(
        threshold=threshold,
        target_accuracy=config.target_accuracy,
        num_valid=int(valid.sum()),
        coverage=wilson(int(answered.sum()), int(test.sum())),
        accuracy=wilson(int(correct[test][answered].sum()), int(answered.sum())) if answered.any() else None,
        critical=critical,
    )


def _critical(answers: pd.DataFrame, name: str, rate: float, minimum: float, task: Task) -> CriticalClass:
    """The threshold of a class by the answers on valid, and what it comes to on test."""

    def naming(column: str) -> npt.NDArray[np.bool_]:
        return answers[column].map(lambda label: name in task.classes([label])).to_numpy(dtype=bool)

    own, claimed, valid = naming("label"), naming("predicted"), (answers["split"] == "valid").to_numpy()
    confidence = answers["confidence"].to_numpy(dtype=np.float64)
    threshold = fit_critical(confidence[valid], claimed[valid], own[valid], rate, minimum)
    sure = claimed & (confidence >= threshold)

    def share(among: npt.NDArray[np.bool_]) -> Estimate | None:
        return wilson(int((sure & among).sum()), int(among.sum())) if among.any() else None

    on_valid = share(valid & ~own)
    assert on_valid is not None  # or nothing would have been fitted
    return CriticalClass(
        name=name, rate=rate, threshold=threshold, valid=on_valid, test=share(~valid & ~own), found=share(~valid & own)
    )


def fit_critical(
    confidence: npt.NDArray[np.float64],
    claimed: npt.NDArray[np.bool_],
    own: npt.NDArray[np.bool_],
    rate: float,
    minimum: float,
) -> float:
    """The smallest confidence, at least `minimum`, from which on answers of a class keep the rate of false ones.

    `claimed` are the images that are answered as the class, `own` those that are of it. Of the other images the share that
    is answered so from that confidence on has a 95 % Wilson interval whose upper limit lies at or below `rate`. NEVER where
    no image that is answered so lies above the false answers that are too many. Raises ValueError where no answer could
    keep the rate: there are too few images of other classes.
    """
    num_others = int((~own).sum())
    allowed = -1
    while allowed < num_others and wilson(allowed + 1, max(1, num_others)).high <= rate:
        allowed += 1
    if allowed < 0:
        raise ValueError(f"{num_others} images of other classes cannot prove a rate of {rate:g}")
    false = np.sort(confidence[claimed & ~own])[::-1]
    if int((false >= minimum).sum()) <= allowed:
        return minimum
    # Above the first false answer that is one too many; equal confidences are answered together or not at all.
    above = confidence[claimed & (confidence > false[allowed])]
    return float(above.min()) if len(above) else NEVER


def fit_threshold(
    confidence: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_], target: float, minimum: float
) -> float:
    """The smallest confidence, at least `minimum`, from which on the answered images reach `target` accuracy.

    1.0 when none does: then nothing but certainty is answered. Raises ValueError on no images.
    """
    if len(confidence) == 0:
        raise ValueError("no images: there is nothing to fit a threshold on")
    order = np.argsort(-confidence, kind="stable")
    reached = np.cumsum(correct[order]) / np.arange(1, len(order) + 1)
    ranked = confidence[order]
    # A threshold between equal confidences does not exist: look where the next one is lower.
    cut = np.append(ranked[1:] < ranked[:-1], True)
    good = np.flatnonzero((reached >= target) & cut)
    return max(minimum, float(ranked[good[-1]])) if len(good) else 1.0
