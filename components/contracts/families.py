"""The protocols of the plug-in families, and what crosses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
from components.contracts.models import Checkpoint, Engine, Precision, Preprocessing
from components.contracts.records import Stored
from components.contracts.verdicts import ClassMetrics, Estimate, Evaluation, Finding, Measurement


class Source(Protocol):
    """Where images come from."""

    def fetch(self, *, out: Path) -> None:
        """Write one folder per class into `out`, the same bytes on every machine."""
        ...


class Backbone(Protocol):
    """Images to features; its fields are its settings."""

    @property
    def preprocessing(self) -> Preprocessing: ...

    @property
    def embedding_dim(self) -> int: ...

    @property
    def weights_choices(self) -> tuple[str, ...]:
        """Names of the pretrained weights it knows; empty when it trains from scratch only."""
        ...

    def build(self) -> torch.nn.Module:
        """A module from normalised float images (n, c, h, w) to features (n, embedding_dim), randomly initialised."""
        ...

    def pretrained(self, weights: str, *, cache: Path) -> dict[str, torch.Tensor]:
        """State dict of `build()`'s module for `weights`; raises WeightsUnavailable."""
        ...


class Task(Protocol):
    """What a model learns to answer: head, loss, and metrics with their uncertainty; its fields are its settings."""

    def head(self, embedding_dim: int, num_classes: int) -> torch.nn.Module:
        """Embeddings (n, embedding_dim) to logits (n, num_classes)."""
        ...

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor: ...

    def probabilities(self, logits: npt.NDArray[Any], temperature: float) -> npt.NDArray[Any]:
        """(n, classes), float64."""
        ...

    def fit_temperature(self, logits: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> float: ...

    def metrics(
        self, logits: npt.NDArray[Any], labels: npt.NDArray[np.int64], temperature: float
    ) -> dict[str, Estimate]: ...

    def per_class(
        self, predicted: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], classes: tuple[str, ...]
    ) -> tuple[ClassMetrics, ...]: ...

    def confusion(
        self, predicted: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], num_classes: int
    ) -> npt.NDArray[np.int64]:
        """Counts (true class, predicted class)."""
        ...

    def reliability(
        self, logits: npt.NDArray[Any], labels: npt.NDArray[np.int64], temperature: float
    ) -> tuple[tuple[float, float, int], ...]:
        """(mean confidence, accuracy, count) of each non-empty confidence bin."""
        ...


class Predictor(Protocol):
    """A loaded engine."""

    def predict(self, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """uint8 images (n, h, w, c) to logits (n, classes) and embeddings (n, embedding_dim)."""
        ...


@dataclass(frozen=True)
class ExportRequest:
    """What a target builds from: the checkpoint, its ONNX graph and, for int8, the calibration images."""

    checkpoint: Stored[Checkpoint]
    onnx: Path
    precision: Precision
    calibration: Callable[[], Iterator[npt.NDArray[np.uint8]]]
    """Batches of uint8 images (n, h, w, c) of the calibration split."""


@dataclass(frozen=True)
class Built:
    """What a target built: its entry file, the hardware it is bound to, the builder and what it counted."""

    entry: str
    runtime: str
    built_for: tuple[str, ...] = ()
    facts: Mapping[str, int | float | str] = field(default_factory=dict)


class Target(Protocol):
    """A runtime that engines are built for and executed in."""

    @property
    def precisions(self) -> tuple[Precision, ...]: ...

    def built_by(self) -> str:
        """What of this machine decides what is built, such as a GPU; empty where any machine builds the same."""
        ...

    def absent(self) -> str:
        """Why this machine cannot build engines for it, such as a library that its platform lacks; empty when it can."""
        ...

    def export(self, request: ExportRequest, *, out: Path) -> Built:
        """Write the engine's files into `out`; raises ExportError."""
        ...

    def load(self, engine: Stored[Engine], *, num_threads: int, num_streams: int = 1) -> Predictor:
        """Open a verified engine; raises EngineUnavailable where this machine cannot execute it.

        With `num_streams` > 1 that many threads may call `predict` at once, sharing `num_threads` threads of the runtime.
        """
        ...


@dataclass(frozen=True)
class Answers:
    """What an engine answered on the test split, images in the split's order."""

    image_ids: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    """Positions in `classes`."""
    logits: npt.NDArray[np.float32]
    """One column a class, in the order of `classes`."""
    classes: tuple[str, ...] = ()

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        top: npt.NDArray[np.int64] = self.logits.argmax(axis=1)
        return top

    def among(self, classes: tuple[str, ...]) -> Answers:
        """The answers on the images of these classes, chosen among these classes alone; matched by name."""
        columns = [self.classes.index(name) for name in classes]
        place = {column: position for position, column in enumerate(columns)}
        kept = [row for row, label in enumerate(self.labels) if int(label) in place]
        labels = self.labels[kept].copy()
        labels[:] = [place[int(label)] for label in labels]
        return Answers(tuple(self.image_ids[row] for row in kept), labels, self.logits[kept][:, columns], classes)


@dataclass(frozen=True)
class Evidence:
    """All that a gate may look at when it judges one engine."""

    engine: Engine
    evaluation: Evaluation
    measurement: Measurement | None
    answers: Answers | None
    reference: Answers | None
    champion: Answers | None
    """The champion's answers on the test images of the classes that it shares with the data, among these classes alone."""
    champion_known: bool
    """True when the ledger proves that there never was a champion, or when the champion's answers are there."""
    champion_missing: str = ""
    """Why there are no answers of the champion that there is; empty when they are there, or when there is no champion."""
    champion_classes: tuple[str, ...] = ()
    """All classes that the champion knows, in its own order."""


class Gate(Protocol):
    """One condition an engine has to meet; its fields are its thresholds."""

    def judge(self, evidence: Evidence) -> Finding: ...
