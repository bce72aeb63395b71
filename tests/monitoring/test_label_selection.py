"""The images that are proposed: captured, unlabelled, each once, uncertain and unlike what is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from watched import END, START, TASK, changed, release, rows, sample

from components.predictionlog import Stretch
from monitoring.label_selection import most_useful
from monitoring.reference import load_reference
from monitoring.window import Window, open_window


@pytest.fixture
def window(tmp_path: Path) -> Window:
    given = sample(200, 1)
    embeddings = given.embeddings.copy()
    embeddings[:20] += 6
    confidence = given.columns["confidence"].copy()
    confidence[:40] = 0.4
    mine = release(tmp_path / "r")
    table = rows(changed(dataclasses.replace(given, embeddings=embeddings), confidence=confidence), "r1")
    return open_window(Stretch((table,), 0, ()), mine.record, TASK, "r1", "1", since=START, until=END, most=1000)


def test_the_strange_and_uncertain_come_first(window: Window, tmp_path: Path) -> None:
    reference = load_reference(release(tmp_path / "other"), TASK)
    everything = set(window.frame["image_sha256"])
    chosen = most_useful(reference, window, available=everything, known=(), count=25)
    assert len(chosen) == 25
    assert chosen["image_sha256"].is_unique
    strange = {f"p{i:06d}" for i in range(20)}
    assert len(strange & set(chosen["prediction_id"])) >= 12
    assert chosen["prediction_id"][0] in strange
    assert chosen["novelty"].median() < chosen["novelty"][0]  # and then unlike each other: ordinary ones come in too
    uncertain = {f"p{i:06d}" for i in range(40)}
    assert len(set(chosen["prediction_id"].head(15)) & uncertain) >= 12


def test_only_what_can_be_labelled_is_proposed(window: Window, tmp_path: Path) -> None:
    reference = load_reference(release(tmp_path / "other"), TASK)
    names = list(window.frame["image_sha256"])
    chosen = most_useful(reference, window, available=names[:30], known=names[:10], count=50)
    assert set(chosen["image_sha256"]) == set(names[10:30])
    assert len(most_useful(reference, window, available=(), known=(), count=5)) == 0


def test_copies_are_proposed_once(tmp_path: Path) -> None:
    mine = release(tmp_path / "r")
    table = rows(sample(50, 1), "r1", image_sha256=["a" * 64] * 50)
    window = open_window(Stretch((table,), 0, ()), mine.record, TASK, "r1", "1", since=START, until=END, most=1000)
    assert len(most_useful(load_reference(mine, TASK), window, available={"a" * 64}, known=(), count=9)) == 1
