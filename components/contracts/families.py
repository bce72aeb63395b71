"""The protocols of the plug-in families, and what crosses them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from components.contracts import verdicts
from components.contracts.issues import Issue, Need, Pair, Severity, issue_id
from components.contracts.models import Checkpoint, Engine, NetworkSize, Precision, Preprocessing
from components.contracts.records import Stored
from components.contracts.verdicts import ClassMetrics, Estimate, Evaluation, Measurement

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd
    import torch


class Source(Protocol):
    """Where images come from; its fields are its settings.

    A source may say by a classmethod `takes(given: str) -> bool` what `data add` is given that is for it, by a suffix or the
    scheme of an address; it gets that as its setting `path`, `address` or `dataset`. One with a class variable
    `resumes = True` finds in `out` what an earlier call left that was killed or failed; for others `out` is empty. What it
    keeps to go on, and is no data, lies in the folder `.received` of `out`. One whose `fetch` takes `progress: Progress`,
    too, is given one.
    """

    def fetch(self, *, out: Path) -> None:
        """Write one folder per class into `out`, or train/, test/ and perhaps val/ of them, the same bytes on every machine.

        A file may be a link to one that lies elsewhere. Where more is known of the files, `out/attributes.jsonl` has an
        object a file: `file`, relative to `out`, and what `components/attributes.py` has columns for; `out/left_out.jsonl`
        has `file` and `reason` for all that was not taken. Raises SourceUnavailable where the images cannot be had,
        DataError with a note a problem for what was given wrongly; nothing of it is imported then.
        """
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


class Loss(Protocol):
    """What a step of training makes smaller; its fields are its settings."""

    @property
    def takes_shares(self) -> bool:
        """Whether targets may be shares of classes (n, classes), as mixed images have, beside class numbers (n,)."""
        ...

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, *, counts: torch.Tensor) -> torch.Tensor:
        """Mean over the batch of logits (n, classes); `counts` (classes,) is the number of training images of each class."""
        ...


class Augmentation(Protocol):
    """A random change of training images, each drawn from the generator alone; its fields are its settings."""

    @property
    def mixes(self) -> bool:
        """Whether it mixes the examples of a batch and their targets by `mix`, and not each picture by `change`."""
        ...

    @property
    def needs_space(self) -> bool:
        """Whether it works on pictures and maps alone, and not on features (n, d)."""
        ...

    def change(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """uint8 (n, h, w, c) to the same shape, every picture changed by a draw of its own."""
        ...

    def mix(
        self, inputs: torch.Tensor, shares: torch.Tensor, generator: torch.Generator, *, channels_last: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixed inputs, float, and shares of classes (n, classes), float, of a batch.

        Inputs are pictures (n, h, w, c), then `channels_last`, maps (n, c, h, w) or features (n, d).
        """
        ...


@dataclass(frozen=True, slots=True)
class Reading:
    """One answer in words: what a log, a protocol and a person are told."""

    label: str
    """In the form of an annotation, so that `Task.classes` tells which classes it names."""
    confidence: float
    """In [0, 1]; what the decision rule compares with its thresholds."""


@dataclass(frozen=True)
class OutputField:
    """One tensor of a task's answers in the serving protocol, one row a picture."""

    name: str
    datatype: Literal["BOOL", "BYTES", "FP32", "INT64"]
    shape: tuple[int, ...]
    """Of one picture; empty for a single value."""
    values: Callable[[npt.NDArray[np.float32]], npt.NDArray[Any] | list[bytes]]
    """From probabilities (n, width) to n rows."""


class Task(Protocol):
    """What a model learns to answer; it owns all that depends on what is predicted. Its fields are its settings.

    An annotation is the name of the class folder that an image lies in, or the label that a person gave it later. Whatever
    else is known of images, and who asks, is nobody's question but the task's. Nothing here imports torch before `head` or
    `loss` is called: servers and monitors ask the same task. A task of one class an image, whose targets are class numbers
    and whose `loss` takes shares of classes too, may say so by a property `one_class`: then losses by name, balanced
    sampling and mixing go with it.
    """

    @property
    def headline(self) -> str:
        """The metric that a person reads first: the share of images whose answer is `right`."""
        ...

    @property
    def figures(self) -> tuple[Literal["confusion", "reliability"], ...]:
        """The figures of a page that say something about this task."""
        ...

    def classes(self, labels: Sequence[str]) -> tuple[str, ...]:
        """What a model answers about, from all annotations of a data set; sorted."""
        ...

    def stratum(self, label: str) -> str:
        """The group of an annotation that splitting divides evenly."""
        ...

    def targets(self, labels: Sequence[str], classes: Sequence[str]) -> npt.NDArray[Any]:
        """One row an image, as `loss` and the metrics take them; raises DataError for an annotation of no class."""
        ...

    def head(self, embedding_dim: int, num_classes: int) -> torch.nn.Module:
        """Embeddings (n, embedding_dim) to logits (n, num_classes)."""
        ...

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean over the batch."""
        ...

    def fit_temperature(self, logits: npt.NDArray[Any], targets: npt.NDArray[Any]) -> float:
        """What logits are divided by before they are probabilities; positive."""
        ...

    def width(self, classes: Sequence[str]) -> int:
        """How many probabilities an answer has."""
        ...

    def probabilities(self, logits: npt.NDArray[Any], temperature: float) -> npt.NDArray[Any]:
        """(n, width), float64."""
        ...

    def read(self, probabilities: npt.NDArray[Any], classes: Sequence[str]) -> list[Reading]:
        """What n answers say."""
        ...

    def outputs(self, classes: Sequence[str]) -> tuple[OutputField, ...]:
        """Tensors of the serving protocol beside label, unsure, confidence, embedding and prediction_id."""
        ...

    def drift_columns(self, probabilities: npt.NDArray[Any], classes: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """What monitoring compares, by name, one value an image: numbers as numbers, text as categories.

        `confidence` (numbers) and `predicted` (text) are always among them.
        """
        ...

    def right(self, logits: npt.NDArray[Any], targets: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which answers are right, one an image."""
        ...

    def agree(self, logits: npt.NDArray[Any], others: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which images two engines answer the same."""
        ...

    def concerns(self, labels: Sequence[str], classes: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Which images can be judged among these classes alone."""
        ...

    def select(self, logits: npt.NDArray[Any], classes: Sequence[str], chosen: Sequence[str]) -> npt.NDArray[Any]:
        """Logits over `classes` as logits over the `chosen` ones of them, in the order of these."""
        ...

    def metrics(self, logits: npt.NDArray[Any], targets: npt.NDArray[Any], temperature: float) -> dict[str, Estimate]:
        """Every metric with its interval and n, the headline among them; raises ValueError on no images."""
        ...

    def per_class(
        self, logits: npt.NDArray[Any], targets: npt.NDArray[Any], classes: tuple[str, ...]
    ) -> tuple[ClassMetrics, ...]:
        """Precision, recall and F1 of every class that has images."""
        ...

    def confusion(
        self, logits: npt.NDArray[Any], targets: npt.NDArray[Any], num_classes: int
    ) -> tuple[tuple[int, ...], ...]:
        """Counts (true class, predicted class); empty where an image has no one class."""
        ...

    def reliability(
        self, logits: npt.NDArray[Any], targets: npt.NDArray[Any], temperature: float
    ) -> tuple[tuple[float, float, int], ...]:
        """(mean confidence, share that is right, count) of each non-empty confidence bin."""
        ...


@dataclass(frozen=True)
class PassRequest:
    """What a pass may know of the network that it changes, never of a test image."""

    step: int
    """Counted from one."""
    before: NetworkSize
    """The network before the first step of this pass."""
    task: Task
    example: torch.Tensor
    """One image as the network takes it, uint8 (1, h, w, c)."""
    images: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]]
    """Batches of training images uint8 (n, h, w, c) with their targets, in an order that stays the same."""
    calibration: Callable[[], Iterator[torch.Tensor]]
    """Batches of training images uint8 (n, h, w, c), stratified as an export's of the calibration split are."""
    valid: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]]
    """Batches of all valid images with their targets, in an order that stays the same: what a pass is decided on."""
    rehearsal: bool
    """Whether the network has random weights and is thrown away: before a training it is tried whether the pass can work."""
    note: Callable[[str], None]
    """Takes what a person should know of how it went, such as what was left as it was."""
    compare: Callable[[str, npt.NDArray[np.bool_]], Estimate]
    """Takes, by a name that the record tells it by, which valid images (n,) were answered rightly; gives the difference
    in their share to the network before the first step of this pass."""
    enough: Callable[[], None]
    """Says that the network stays as `begin` left it: the step is neither fine-tuned nor ended."""


class Pass(Protocol):
    """A change of a trained network that makes it smaller or faster; its fields are its settings.

    It works in steps: `begin` changes the network, which is then fine-tuned, and `end` finishes the step. The same network
    and images give the same bits, so that a run that was killed goes on where it was. After `end` the network is one of
    plain layers again, whose numbers of channels can be told from the shapes of its tensors: it is rebuilt by these alone.

    One that is of use to engines of one precision alone says so by a property `only_for`, such as `int8`: a recipe
    without such an engine is refused, and what the passes cost is told by such engines. One with a true
    `keeps_batch_norm` is fine-tuned with it frozen where the recipe says no phases.
    """

    @property
    def steps(self) -> int:
        """How many times the network is changed and fine-tuned."""
        ...

    @property
    def undone_by_training(self) -> str:
        """What of its work a further training would undo, such as `the zeros that it makes`; empty for nothing.

        Such a pass is the last one of a recipe.
        """
        ...

    def begin(self, network: torch.nn.Module, request: PassRequest) -> None:
        """Change the network in place, uint8 images (n, h, w, c) to logits and embeddings, in evaluation mode.

        Raises ConfigError, naming the setting or the layer, for what this network cannot be asked to do.
        """
        ...

    def end(self, network: torch.nn.Module, request: PassRequest) -> None:
        """Finish the step after its fine-tuning."""
        ...


class Predictor(Protocol):
    """A loaded engine."""

    def predict(self, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """uint8 images (n, h, w, c) to logits (n, classes) and embeddings (n, embedding_dim)."""
        ...


@dataclass(frozen=True)
class ExportRequest:
    """What a target builds from: the checkpoint, its ONNX graph and, for int8, images to choose by, never test's."""

    checkpoint: Stored[Checkpoint]
    onnx: Path
    precision: Precision
    calibration: Callable[[], Iterator[npt.NDArray[np.uint8]]]
    """Batches of uint8 images (n, h, w, c) of the calibration split, stratified: every beginning has the strata in their
    shares. The callable raises ExportError where the split is empty or holds a picture of test."""
    valid: Callable[[], Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]]]
    """Batches of images of the valid split as those of calibration, each with its `task.targets`, one row an image."""
    task: Task
    """What the model answers: it says which answers are right, and which are the same."""


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
    labels: tuple[str, ...]
    """The annotations."""
    logits: npt.NDArray[np.float32]
    classes: tuple[str, ...]
    """What the logits are about."""
    task: Task

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """Which of them are right."""
        return self.task.right(self.logits, self.task.targets(self.labels, self.classes))

    def agree(self, other: Answers) -> npt.NDArray[np.bool_]:
        """Which of them another engine answers the same; both are about the same images and classes."""
        return self.task.agree(self.logits, other.logits)

    def unlike(self, champion: Answers) -> str:
        """Why they cannot be compared, image by image, with a champion's over the same classes; empty where they can."""
        import numpy as np

        if self.image_ids != champion.image_ids or self.labels != champion.labels:
            return "the champion was asked about other test images or labels than this engine"
        if not (np.isfinite(self.logits).all() and np.isfinite(champion.logits).all()):
            return "some answers are not finite numbers"
        return ""

    def among(self, classes: tuple[str, ...]) -> Answers:
        """The answers on the images that can be judged among these classes, chosen among them alone; matched by name."""
        kept = self.task.concerns(self.labels, classes)
        chosen = [row for row, is_kept in enumerate(kept) if is_kept]
        return Answers(
            tuple(self.image_ids[row] for row in chosen),
            tuple(self.labels[row] for row in chosen),
            self.task.select(self.logits[chosen], self.classes, classes),
            classes,
            self.task,
        )


@dataclass(frozen=True)
class Slices:
    """Which slices each test image is in."""

    image_ids: tuple[str, ...]
    names: Mapping[str, Sequence[str]]
    """By kind, such as `brightness`: the name of each image's slice, empty where it is in none."""
    notes: tuple[str, ...] = ()
    """Why there is nothing of a kind."""

    def knows(self, image_ids: Sequence[str]) -> bool:
        """Whether every one of these images is known."""
        return set(image_ids) <= set(self.image_ids)

    def of(self, image_ids: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """The names of these images' slices by kind, text (n,); raises KeyError for an image that is not known."""
        import numpy as np

        place = {image: row for row, image in enumerate(self.image_ids)}
        chosen = [place[image] for image in image_ids]
        return {kind: np.array([names[row] for row in chosen], dtype=object) for kind, names in self.names.items()}


@dataclass(frozen=True)
class Corrupted:
    """What an engine answered on the same test images in each variant of components/corruptions.py."""

    answers: Mapping[str, Answers]
    """By variant; empty where there are none."""
    reason: str = ""
    """Why there are none; empty when they are there."""
    asked: str = ""
    """The engine that was asked in place of this one, because both answer alike; empty when it was asked itself."""


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
    headline: str = "accuracy"
    """Name of the task's headline metric."""
    champion_classes: tuple[str, ...] = ()
    """All classes that the champion knows, in its own order, by their names of today."""
    beyond_test: Answers | None = None
    """Its answers on the images of valid and calibration, without labels; None where it was not asked."""
    reference_beyond_test: Answers | None = None
    slices: Slices | None = None
    """Groups of the test images; None where none were made."""
    corrupted: Corrupted | None = None
    """Its answers on corrupted test images; None where nobody was asked about any."""
    champion_corrupted: Corrupted | None = None
    """The champion's on the same images, as far as they are of the shared classes, among these classes alone."""

    def champion_unknown(self, gate: str) -> str:
        """Why a gate cannot compare with the champion that there is, or may be; empty where that is known."""
        if self.champion_missing:
            return (
                f"the champion cannot be compared with: {self.champion_missing}. Make that possible, or leave {gate} out of "
                f"the recipe's gates; whoever approves is told so"
            )
        return "" if self.champion_known else "it is not known whether there is a champion to compare with"


@dataclass(frozen=True)
class Least:
    """The fewest test images with which a gate can pass at all: where every answer is right."""

    images: int | None = 1
    """None where no number would do."""
    of_each_class: int = 0
    against_champion: bool = False
    """Whether that counts only once there is a champion."""
    below_fp32_alone: bool = False
    """Whether that counts only for engines below fp32: others are judged on images that are no test images, too."""


class Gate(Protocol):
    """One condition an engine has to meet; its fields are its thresholds.

    A gate that needs a number of test images may say so by a method `least(self) -> Least`: whoever adds images is told.
    One with a class variable `needs_corrupted = True` is refused in a recipe that corrupts no images.
    """

    def judge(self, evidence: Evidence) -> verdicts.Finding: ...


class Keep(Protocol):
    """Keeps numbers that take long to compute, for the next look at the same pictures."""

    def __call__(
        self, finding: str, asked: str, pictures: Sequence[str], compute: Callable[[], npt.NDArray[np.float32]], /
    ) -> npt.NDArray[np.float32]:
        """What `compute` gives, a number (n,) for each of n pictures by digest, computed or as it was kept.

        `asked` tells the settings of the finding that the numbers depend on; they depend on nothing else but embeddings.
        """
        ...


def compute_anew(
    _finding: str, _asked: str, _pictures: Sequence[str], compute: Callable[[], npt.NDArray[np.float32]], /
) -> npt.NDArray[np.float32]:
    """Where nothing is kept."""
    return compute()


@dataclass(frozen=True)
class Known:
    """All that a finding may look at in a data set. A finding changes none of it."""

    table: pd.DataFrame
    """Facts of the usable files, one row a file in the order of their paths: path, label, sha256, picture, bytes, format,
    mode, width, height, short_side, brightness, contrast, sharpness and more; `source`, empty where nobody said it; `split`
    (test or rest) where it is known."""
    refused: pd.DataFrame
    """The files that cannot be used, with the same columns as far as they are known, and `reason`."""
    pairs: Sequence[Pair] | None = None
    """Pictures that are alike; None where they were not looked for."""
    embeddings: npt.NDArray[np.float32] | None = None
    """(n, d), a row for each of the table."""
    probabilities: npt.NDArray[np.float32] | None = None
    """(n, classes), a row for each of the table, by models that were not trained on that file."""
    classes: tuple[str, ...] = ()
    """All labels, sorted; the columns of `probabilities`."""
    keep: Keep = compute_anew

    def issue(
        self,
        kind: str,
        files: Sequence[str],
        *,
        severity: Severity,
        score: float,
        threshold: float,
        detail: str,
        action: str,
        candidate: str = "",
        about: str = "",
    ) -> Issue:
        """An issue with its id; `about` names the class or value that it is about where it is about no file."""
        told = self._content
        return Issue(
            kind=kind,
            severity=severity,
            files=tuple(files),
            score=min(1.0, max(0.0, float(score))),
            threshold=threshold,
            detail=detail,
            action=action,
            candidate=candidate,
            id=issue_id(kind, [told[file] for file in files], about),
        )

    @functools.cached_property
    def _content(self) -> dict[str, tuple[str, str]]:
        """(sha256, label) of every file; the path in place of the sha256 of a file that cannot be read."""
        found: dict[str, tuple[str, str]] = {}
        for rows in (self.table, self.refused):
            if len(rows):
                for path, sha256, label in zip(rows["path"], rows["sha256"], rows["label"], strict=True):
                    found[path] = (sha256 or path, label)
        return found


class Finding(Protocol):
    """One kind of thing that can be wrong with data; its fields are its settings.

    What is found is a question to a person: nothing is removed by it. A score is in [0, 1], lower is worse.
    """

    @property
    def needs(self) -> frozenset[Need]:
        """What it cannot do without, beside the facts; where that is not known it is not asked."""
        ...

    def look(self, known: Known) -> list[Issue]:
        """What it finds, the worst first, made by `known.issue` with its own name; the same for the same data."""
        ...
