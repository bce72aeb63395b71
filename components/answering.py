"""A release that answers: its engine, once it has answered the golden vectors as it should, and its rule of decision.

A server's engine process and MLflow's flavour of a registered version answer by this.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from components import plugins
from components.contracts.errors import EngineUnavailable
from components.contracts.families import Predictor, Task
from components.contracts.records import Stored
from components.contracts.releases import Release
from components.images import decode, prepare
from components.int8_arithmetic import int8_arithmetic
from components.releases import INT8_ARITHMETIC, SAME_ARITHMETIC_TOLERANCE

_PIXEL_TOLERANCE = 2.0
"""Mean difference, in grey levels, that another build of the JPEG library may make."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What is said of one picture."""

    predicted: str
    """What the task reads, also when unsure; of classes the likeliest."""
    confidence: float
    unsure: bool
    """Whether the threshold that the release has for such an answer is not reached."""
    label: str
    """`predicted`, or `unsure_label` when unsure; never a class then."""


def decided(release: Release, task: Task, probabilities: npt.NDArray[Any]) -> list[Decision]:
    """The release's decision rule on what its task reads of (n, width)."""
    classes, rule, found = release.engine.classes, release.decision, []
    for reading in task.read(probabilities, classes):
        unsure = reading.confidence < needed(task, reading.label, rule.threshold, rule.class_thresholds)
        label = unsure_label(classes) if unsure else reading.label
        found.append(Decision(reading.label, reading.confidence, unsure, label))
    return found


def needed(task: Task, label: str, threshold: float, of_classes: Mapping[str, float]) -> float:
    """The confidence that an answer has to reach: `threshold`, and that of each critical class that it names."""
    if not of_classes:
        return threshold
    return max([threshold, *(of_classes[name] for name in task.classes([label]) if name in of_classes)])


def unsure_label(classes: Sequence[str]) -> str:
    """What stands for no decision: "unsure", in as many brackets as it takes to be no class."""
    word = "unsure"
    while word in classes:
        word = f"({word})"
    return word


@dataclass(frozen=True)
class GoldenVectors:
    """Pictures of a release with the answers that it has to give."""

    encoded: tuple[bytes, ...]
    pixels: npt.NDArray[np.uint8]
    """(n, h, w, c), as the engine takes them."""
    probabilities: npt.NDArray[np.float32]
    tolerance: float
    """How much a probability may differ on this machine."""


def golden_vectors(release: Release, path: Path) -> GoldenVectors:
    """The golden vectors in a verified file of the release."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        names = file.keys()
        golden = {name: file.get_tensor(name) for name in names}
        written_by = (file.metadata() or {}).get(INT8_ARITHMETIC)
    tolerance = release.golden_tolerance
    if written_by and written_by == int8_arithmetic():
        tolerance = min(tolerance, SAME_ARITHMETIC_TOLERANCE)
    encoded = tuple(golden[f"encoded.{index:03d}"].tobytes() for index in range(len(golden["pixels"])))
    return GoldenVectors(encoded, golden["pixels"], golden["probabilities"], tolerance)


class LoadedRelease:
    """A verified release's engine, loaded, which answered its golden vectors; raises EngineUnavailable where it does not."""

    def __init__(self, release: Release, *, engine: Path, golden: Path, num_threads: int, num_streams: int = 1) -> None:
        """`engine` is the folder of the engine's files, `golden` the file of the vectors; both are verified already."""
        self.release = release
        target = plugins.load("targets", release.engine.target, release.engine.settings)
        self._predictor: Predictor = target.load(
            Stored(release.engine, engine), num_threads=num_threads, num_streams=num_streams
        )
        self.task: Task = plugins.load("tasks", release.task, release.task_settings)
        self.decode_ms = self._check_golden(golden)
        """What decoding and preparing one of the golden pictures takes, in time of the processor."""

    def predict(self, pixels: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Prepared pictures (n, h, w, c) to probabilities (n, width) and embeddings (n, embedding_dim)."""
        logits, embedding = self._predictor.predict(pixels)
        probabilities = self.task.probabilities(logits, self.release.engine.temperature)
        return probabilities.astype(np.float32), embedding

    def _check_golden(self, path: Path) -> float:
        golden = golden_vectors(self.release, path)
        pixels, expected, tolerance = golden.pixels, golden.probabilities, golden.tolerance
        decode_ms = []
        for index, raw in enumerate(golden.encoded):
            start = time.process_time()
            decoded = prepare(decode(raw), self.release.engine.preprocessing)
            decode_ms.append((time.process_time() - start) * 1e3)
            difference = float(np.abs(decoded.astype(np.float32) - pixels[index].astype(np.float32)).mean())
            if difference > _PIXEL_TOLERANCE:
                raise EngineUnavailable(
                    f"golden picture {index} decodes to other pixels here (mean difference {difference:.1f} grey levels)"
                )
        found, _ = self.predict(pixels)
        width = self.task.width(self.release.engine.classes)
        if found.shape != (len(pixels), width):
            raise EngineUnavailable(
                f"task {self.release.task!r} makes {found.shape} probabilities of {len(pixels)} answers, expected "
                f"{(len(pixels), width)}: its width and its probabilities do not agree"
            )
        worst = float(np.abs(found - expected).max()) if np.isfinite(found).all() else float("inf")
        if not worst <= tolerance:  # what is no number differs by more than anything
            raise EngineUnavailable(
                f"the engine answers its golden vectors wrongly here: a probability differs by {worst:.3f}, "
                f"accepted are {tolerance:g}"
            )
        return statistics.median(decode_ms)  # the first one loads the decoder
