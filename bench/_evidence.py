"""Answers and evidence as a gate gets them, for benchmarks that ask gates."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from components.contracts.families import Answers, Evidence
from components.contracts.models import Engine, Preprocessing
from components.contracts.verdicts import Evaluation
from components.tasks.classification import Task

CLASSES = ("a", "b")


class Simulated:
    """Answers to `n` images of two classes in turn, by which of them are right."""

    def __init__(self, n: int) -> None:
        self.labels = tuple(CLASSES[image % 2] for image in range(n))
        self._ids = tuple(f"{image:06d}" for image in range(n))
        self._truth = np.arange(n) % 2

    def of(self, right: np.ndarray[Any, np.dtype[np.bool_]]) -> Answers:
        logits = np.eye(2, dtype=np.float32)[np.where(right, self._truth, 1 - self._truth)]
        return Answers(self._ids, self.labels, logits, CLASSES, Task())


def evidence_of(answers: Answers | None, *, champion: Answers | None = None, **measured: Any) -> Evidence:
    """Evidence of these answers, or of these figures of the evaluation."""
    evaluation = Evaluation(engine="bench", engine_digest="", test_digest="", status="evaluated", **measured)
    return Evidence(
        engine=_engine(answers.classes if answers is not None else CLASSES),
        evaluation=evaluation,
        measurement=None,
        answers=answers,
        reference=None,
        champion=champion,
        champion_known=True,
    )


@functools.cache
def _engine(classes: tuple[str, ...]) -> Engine:
    return Engine(
        name="bench",
        target="onnxruntime",
        precision="fp32",
        settings={},
        checkpoint_digest="",
        files=(),
        entry="",
        preprocessing=Preprocessing(
            channels=1, height=16, width=16, resize_shortest=16, interpolation="bilinear", mean=(0.5,), std=(0.5,)
        ),
        classes=classes,
        embedding_dim=1,
        temperature=1.0,
        runtime="",
        built_for=(),
        facts={},
    )
