"""A release answers only where it decodes and answers its golden vectors as it should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from served import smoke_release, unpacked
from tasks_of_tests.several_labels import Task as SeveralLabels

from components.answering import LoadedRelease, decided, needed
from components.contracts.errors import EngineUnavailable
from components.contracts.records import Stored
from components.contracts.releases import NEVER, CriticalClass, Release
from components.int8_arithmetic import int8_arithmetic
from components.intervals import wilson
from components.releases import GOLDEN, INT8_ARITHMETIC, TOLERANCE


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Stored[Release]:
    return smoke_release(unpacked(tmp_path_factory.mktemp("older")))


def loaded(release: Stored[Release], golden: Path, record: Release | None = None) -> LoadedRelease:
    return LoadedRelease(record or release.record, engine=release.folder / "engine", golden=golden, num_threads=1)


def one_moved(tensors: dict[str, Any]) -> None:
    tensors["probabilities"][3, 0] += 0.3


def all_moved_a_little(tensors: dict[str, Any]) -> None:
    tensors["probabilities"] += 0.04


def no_number(tensors: dict[str, Any]) -> None:
    tensors["probabilities"][0, 0] = np.nan


def of_another_decoder(tensors: dict[str, Any]) -> None:
    tensors["encoded.005"] = tensors["encoded.000"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (one_moved, r"answers its golden vectors wrongly here: a probability differs by 0\.\d+, accepted are 0\.03"),
        (all_moved_a_little, r"a probability differs by 0\.\d+, accepted are 0\.03"),
        (no_number, "a probability differs by"),
        (of_another_decoder, r"golden picture 5 decodes to other pixels here \(mean difference \d+\.\d grey levels\)"),
    ],
)
def test_a_release_that_answers_otherwise_here_is_not_loaded(
    release: Stored[Release], tmp_path: Path, change: Callable[[dict[str, Any]], None], told: str
) -> None:
    record = release.record.model_copy(update={"golden_tolerance": 0.03})
    tensors = load_file(release.folder / GOLDEN)
    assert loaded(release, release.folder / GOLDEN, record).decode_ms > 0
    change(tensors)
    save_file(tensors, tmp_path / GOLDEN)
    with pytest.raises(EngineUnavailable, match=told):
        loaded(release, tmp_path / GOLDEN, record)


@pytest.mark.parametrize(("written_by", "loads"), [(int8_arithmetic(), False), ("another processor", True), ("", True)])
def test_int8_may_differ_more_only_on_a_processor_that_multiplies_otherwise(
    release: Stored[Release], tmp_path: Path, written_by: str, loads: bool
) -> None:
    """Releases of before, and those written where the processor is not known, do not tell who wrote their vectors."""
    record = release.record.model_copy(update={"golden_tolerance": TOLERANCE["int8"]})
    tensors = load_file(release.folder / GOLDEN)
    metadata = {INT8_ARITHMETIC: written_by} if written_by else None
    save_file(tensors, tmp_path / GOLDEN, metadata=metadata)
    assert loaded(release, tmp_path / GOLDEN, record).decode_ms > 0
    all_moved_a_little(tensors)
    save_file(tensors, tmp_path / GOLDEN, metadata=metadata)
    if loads:
        assert loaded(release, tmp_path / GOLDEN, record).decode_ms > 0
        return
    with pytest.raises(EngineUnavailable, match=r"a probability differs by 0\.\d+, accepted are 0\.01"):
        loaded(release, tmp_path / GOLDEN, record)


def test_pictures_prepared_otherwise_than_the_engine_was_built_for_are_noticed(release: Stored[Release]) -> None:
    """As where the record of a release is not the one that its engine came with."""
    engine = release.record.engine
    wider = engine.preprocessing.model_copy(update={"resize_shortest": 2 * engine.preprocessing.resize_shortest})
    record = release.record.model_copy(update={"engine": engine.model_copy(update={"preprocessing": wider})})
    with pytest.raises(EngineUnavailable, match="golden picture 0 decodes to other pixels here"):
        loaded(release, release.folder / GOLDEN, record)


def test_below_the_threshold_no_class_is_said(release: Stored[Release]) -> None:
    answering = loaded(release, release.folder / GOLDEN)
    record = release.record.model_copy(update={"decision": release.record.decision.model_copy(update={"threshold": 0.75})})
    rows = np.array([[0.1, 0.8, 0.1], [0.15, 0.1, 0.75], [0.7, 0.2, 0.1]], np.float32)
    found = decided(record, answering.task, rows)
    classes = record.engine.classes
    assert [(one.predicted, one.label, one.unsure) for one in found] == [
        (classes[1], classes[1], False),
        (classes[2], classes[2], False),
        (classes[0], "unsure", True),
    ]


def test_an_answer_that_names_a_critical_class_needs_more(release: Stored[Release]) -> None:
    answering, classes = loaded(release, release.folder / GOLDEN), release.record.engine.classes
    share = wilson(0, 400)

    def critical(name: str, threshold: float) -> CriticalClass:
        return CriticalClass(name=name, rate=0.01, threshold=threshold, valid=share, test=share, found=share)

    rows = np.array([[0.1, 0.8, 0.1], [0.02, 0.95, 0.03], [0.8, 0.1, 0.1], [0.0, 0.0, 1.0]], np.float32)
    rule = release.record.decision.model_copy(
        update={"threshold": 0.75, "critical": (critical(classes[1], 0.9), critical(classes[2], NEVER))}
    )
    record = release.record.model_copy(update={"decision": rule})
    found = decided(record, answering.task, rows)
    assert [(one.predicted, one.label) for one in found] == [
        (classes[1], "unsure"),
        (classes[1], classes[1]),
        (classes[0], classes[0]),
        (classes[2], "unsure"),
    ]


def test_an_answer_of_several_labels_needs_what_each_critical_one_of_them_does() -> None:
    task, thresholds = SeveralLabels(), {"b": 0.9, "c": 0.95}
    for label, threshold in (("a", 0.6), ("a+b", 0.9), ("b+c", 0.95), ("bc", 0.6)):
        assert needed(task, label, 0.6, thresholds) == threshold
