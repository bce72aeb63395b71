"""What the parts of visionloop agree on: records, the protocols of the families, and every error.

Exceptions::

    VisionloopError                 something is wrong that a person can act on
    ├── ConfigError (ValueError)    a recipe, an override or a command-line value
    │   ├── UnknownName             a plug-in, class or key that does not exist; lists the valid ones
    │   └── PluginFailed            a workspace's own plug-in cannot be used, raised, or answered something else
    ├── DataError                   the images or their version
    │   ├── UndecodableImage        one file is not an image we accept; the reason is its message
    │   ├── DataDiffers             the folder is not what data.dvc says
    │   └── DataRejected            validation refused the data set
    ├── StoreError                  an artefact could not be written or read
    │   ├── TamperedArtefact        bytes differ from the digests in their manifest
    │   └── SchemaTooNew            written by a newer visionloop
    ├── WorkspaceBusy               another run holds this workspace
    ├── TrainingDiverged            the loss is not finite
    ├── CheckpointMismatch          a checkpoint belongs to another config or other data
    ├── ExportError                 a target could not build its engine
    ├── EngineUnavailable           an engine cannot be executed on this machine
    ├── WeightsUnavailable          pretrained weights could not be had
    ├── RegistryUnavailable         MLflow, the ledger or the release store does not answer
    ├── OrchestratorUnavailable     the Prefect server that is named does not answer
    ├── DecisionRefused             the ledger's rules do not allow this approval, rejection, promotion or rollback
    └── MonitoringError             a window of predictions cannot be judged
        └── ReferenceUnavailable    what production is compared with is missing, changed or another encoder's
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch


class VisionloopError(Exception):
    """Something is wrong that a person can act on; the message says what, what was expected and what to do."""


class ConfigError(VisionloopError, ValueError):
    """A recipe, an override or a command-line value is not valid."""


class UnknownName(ConfigError):
    """A name that nothing carries."""

    def __init__(self, what: str, name: str, valid: Sequence[str]) -> None:
        super().__init__(f"unknown {what} {name!r}; valid: {', '.join(sorted(valid)) or '(none)'}")


class PluginFailed(ConfigError):
    """A workspace's own plug-in cannot be loaded or used, raised, or answered what its family does not."""


class DataError(VisionloopError):
    """The images, or the version that pins them, are not usable."""


class UndecodableImage(DataError):
    """One file is not an image we accept; the message is the reason."""


class DataDiffers(DataError):
    """The data folder is not what data.dvc pins."""


class DataRejected(DataError):
    """Validation refused the data set."""


class StoreError(VisionloopError):
    """An artefact could not be written or read."""


class TamperedArtefact(StoreError):
    """Bytes on disk differ from the digests in their manifest."""


class SchemaTooNew(StoreError):
    """A record was written by a newer visionloop."""


class WorkspaceBusy(VisionloopError):
    """Another run holds this workspace."""


class TrainingDiverged(VisionloopError):
    """The training loss is not finite."""


class CheckpointMismatch(VisionloopError):
    """A training checkpoint belongs to another config or other data."""


class ExportError(VisionloopError):
    """A target could not build its engine."""


class EngineUnavailable(VisionloopError):
    """An engine cannot be executed on this machine."""


class WeightsUnavailable(VisionloopError):
    """Pretrained weights could not be had."""


class RegistryUnavailable(VisionloopError):
    """MLflow, the ledger or the release store does not answer."""


class OrchestratorUnavailable(VisionloopError):
    """The Prefect server that the environment names does not answer, or does not take our credential."""


class DecisionRefused(VisionloopError):
    """The ledger's rules do not allow this approval, rejection, promotion or rollback."""


class MonitoringError(VisionloopError):
    """A window of predictions cannot be judged."""


class ReferenceUnavailable(MonitoringError):
    """The reference sample of a release is missing, changed or another encoder's."""


def canonical_json(value: object) -> str:
    """JSON with one spelling per value: sorted keys, no spaces, NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def utc_of(text: str) -> datetime.datetime:
    """A moment that a person wrote, in UTC: ISO 8601 with an offset or Z, taken for UTC without one.

    Raises ValueError that says what is wrong with it.
    """
    text = text.strip()
    try:
        # Digits alone are more likely seconds since 1970, or a typing error, than a day.
        found = None if text.isdigit() else datetime.datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None:
        raise ValueError("not a moment; expected ISO 8601, such as 2026-03-01T14:00, 2026-03-01T14:00+01:00 or 2026-03-01")
    if not 1970 < found.year < 9999:
        raise ValueError("not a moment after 1970 that a calendar knows")
    return found.replace(tzinfo=datetime.UTC) if found.tzinfo is None else found.astimezone(datetime.UTC)


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on, each once; groups are told by their first."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        link = queue.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        queue += link.exceptions[:1] if isinstance(link, BaseExceptionGroup) else []
        original = getattr(link, "orig", None)  # SQLAlchemy's, beside the cause
        queue += [other for other in (original, link.__cause__, link.__context__) if isinstance(other, BaseException)]


def in_short(error: BaseException) -> str:
    """Kind and first line of an error, as short as a sentence bears."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


_SECRET = re.compile(r"(?<=://)[^/?#\s'\"]*:[^/?#\s'\"]*(?=@)")
"""User and password of an address."""


def redacted(text: str) -> str:
    """A text without the passwords of the addresses in it."""
    return _SECRET.sub("***", text)


def is_text(name: str) -> bool:
    """Whether a name is one line of text: no control characters, no line breaks, no bytes that are not UTF-8."""
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name)


def counted(number: int, noun: str) -> str:
    """A number with its noun in the right form: `1 class`, `2 classes`, `0 images`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'}"


def shown_utc(text: str) -> str:
    """A recorded moment as people read it, `2026-03-01 14:00:00 UTC`."""
    return f"{utc_of(text):%Y-%m-%d %H:%M:%S} UTC"


class Record(BaseModel):
    """A frozen, versioned fact: small, JSON, without absolute paths or live objects.

    Unknown keys are refused. `schema_version` is written with every record; `read` upgrades older ones
    through `UPGRADES` and refuses newer ones with `SchemaTooNew`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    UPGRADES: ClassVar[Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]]] = {}

    schema_version: int = 1
    """A subclass whose fields change raises its default and adds an entry to UPGRADES."""

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Self:
        """Build the record from JSON data of this or an older schema version."""
        values = dict(data)
        newest: int = cls.model_fields["schema_version"].default
        version = values.get("schema_version")
        if not isinstance(version, int) or version < 1:
            raise StoreError(f"{cls.__name__} without a schema_version; expected 1 to {newest}")
        if version > newest:
            raise SchemaTooNew(
                f"{cls.__name__} has schema version {version}, this visionloop reads up to {newest}; upgrade visionloop"
            )
        while version < newest:
            values = cls.UPGRADES[version](values)
            version += 1
            values["schema_version"] = version
        try:
            return cls.model_validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            raise StoreError(f"not a valid {cls.__name__}: {first_problem(error)}") from error

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = self.model_dump(mode="json")
        return data

    def digest(self) -> str:
        """sha256 of the record's canonical JSON: equal records, equal digests, on any machine."""
        return sha256_text(canonical_json(self.to_json()))


RecordT = TypeVar("RecordT", bound=Record)
RecordCo = TypeVar("RecordCo", bound=Record, covariant=True)


def first_problem(error: ValidationError) -> str:
    """The first complaint of a pydantic error as `place: what is wrong`."""
    problem = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    return f"{place}: {plain(problem)}" if place else plain(problem)


def plain(problem: Mapping[str, Any]) -> str:
    """The message of a pydantic problem without the prefix that tells which exception it came from."""
    return str(problem["msg"]).removeprefix("Value error, ").replace("Tuple should", "The list should")


@dataclass(frozen=True)
class Stored(Generic[RecordCo]):
    """A record together with the verified folder that holds its files."""

    record: RecordCo
    folder: Path


class FileDigest(Record):
    """One file of an artefact: name relative to the artefact's folder, sha256 and size in bytes."""

    name: str
    sha256: str
    bytes: int


class DataVersion(Record):
    """A pinned state of `data/`: DVC's directory hash and the digest of the frozen test ledger beside it."""

    dvc_hash: str
    num_files: int
    bytes: int
    ledger_sha256: str


class Dataset(Record):
    """Images that decoded and passed validation; `num_input = num_kept + num_quarantined`."""

    data: DataVersion
    samples: FileDigest
    quarantine: FileDigest
    classes: tuple[str, ...]
    class_counts: dict[str, int]
    num_input: int
    num_kept: int
    num_quarantined: int
    warnings: tuple[str, ...]


SplitName = Literal["train", "valid", "calibration", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "valid", "calibration", "test")


class Splits(Record):
    """Every kept image in exactly one split; `test_digest` names the test images and their labels alone."""

    data: DataVersion
    table: FileDigest
    classes: tuple[str, ...]
    counts: dict[SplitName, int]
    class_counts: dict[SplitName, dict[str, int]]
    num_duplicate_groups: int
    test_digest: str


class Preprocessing(Record):
    """How a file becomes the engine's input: decode, colours, EXIF-rotate, resize the short side, crop the centre.

    The result is uint8 (height, width, channels). Scaling to `(x / 255 - mean) / std` is part of every
    engine's graph, so no caller repeats it.
    """

    channels: Literal[1, 3]
    height: int = Field(ge=8, le=1024)
    width: int = Field(ge=8, le=1024)
    resize_shortest: int = Field(ge=8, le=2048)
    """Length in pixels of the short side before the centre crop; equal to height and width for no margin."""
    interpolation: Literal["bilinear", "bicubic"]
    """Always antialiased."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    colour: Literal["srgb", "as stored"] = Field(default="", validate_default=True)
    """Whether a file's colours are converted to sRGB, which is the default, or are the numbers that it holds.

    Absent in JSON, and only there, it is "as stored": records from before the field are that, and keep their digests.
    """

    @field_validator("colour", mode="before")
    @classmethod
    def _before_the_field(cls, value: Any, info: ValidationInfo) -> Any:
        return value or ("as stored" if info.mode == "json" else "srgb")

    @model_serializer(mode="wrap")
    def _without_the_field(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if self.colour == "as stored":
            del values["colour"]
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need one value per channel ({self.channels})")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        if self.resize_shortest < max(self.height, self.width):
            raise ValueError("resize_shortest must not be smaller than the crop")
        return self


class Checkpoint(Record):
    """Trained weights and everything needed to rebuild the module and to read its outputs."""

    splits_digest: str
    task: str
    task_settings: dict[str, bool | int | float | str]
    backbone: str
    backbone_settings: dict[str, bool | int | float | str]
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    embedding_dim: int
    weights: FileDigest
    history: FileDigest
    temperature: float = Field(gt=0)
    """Divides the logits before softmax; fitted on the valid split."""
    best_epoch: int
    epochs: int
    valid_metrics: dict[str, float]


Precision = Literal["fp32", "fp16", "int8"]


class Engine(Record):
    """A model in the form a runtime executes: uint8 NHWC in, `logits` and `embedding` out."""

    name: str
    target: str
    precision: Precision
    settings: dict[str, Any]
    """The target's settings it was built with; it is loaded with the same."""
    checkpoint_digest: str
    files: tuple[FileDigest, ...]
    entry: str
    """The file of `files` that the runtime opens."""
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    embedding_dim: int
    temperature: float = Field(gt=0)
    runtime: str
    """Library and version that built it."""
    built_for: tuple[str, ...]
    """Hardware the file is bound to; empty for any machine that runs the runtime."""
    facts: dict[str, int | float | str]
    """What the builder counted, such as `int8_ops`."""

    @property
    def size_bytes(self) -> int:
        return sum(file.bytes for file in self.files)


class Estimate(Record):
    """A measured value with its 95 % interval and the number of images behind it."""

    value: float
    low: float
    high: float
    n: int = Field(ge=1)
    method: str

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}] (n={self.n})"


class ClassMetrics(Record):
    """One class on one split. Precision and F1 are absent when the class was never predicted."""

    name: str
    support: int
    precision: Estimate | None
    recall: Estimate
    f1: Estimate | None


class Evaluation(Record):
    """What one engine answered on one split; deterministic, so it is cached by content."""

    engine: str
    engine_digest: str
    test_digest: str
    status: Literal["evaluated", "not executed here", "not comparable"]
    """`not comparable`: a champion that shares too few classes or test images with the data to be asked about them."""
    reason: str = ""
    """Why it was not executed, or what is wrong with its answers; empty when nothing is."""
    num_images: int = 0
    metrics: dict[str, Estimate] = {}
    per_class: tuple[ClassMetrics, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    """Rows are true classes, columns predictions."""
    reliability: tuple[tuple[float, float, int], ...] = ()
    """(mean confidence, accuracy, count) of each non-empty confidence bin."""
    predictions: FileDigest | None = None


class Measurement(Record):
    """Latency and size of one engine on one machine; never comes from another machine."""

    engine: str
    engine_digest: str
    status: Literal["measured", "not executed here"]
    reason: str = ""
    machine: str
    """Fingerprint of the machine: processor, cores, operating system."""
    batch_size: int = 1
    num_threads: int = 0
    num_runs: int = 0
    latency_p50_ms: float | None = None
    latency_p90_ms: float | None = None
    latency_p99_ms: float | None = None
    """Each the median of the rounds' own percentiles, so that one noisy round does not decide."""
    rounds_p50_ms: tuple[float, ...] = ()
    rounds_p99_ms: tuple[float, ...] = ()
    num_attempts: int = 1
    """How often it was measured because the rounds disagreed; this is the attempt whose rounds agreed best."""
    size_bytes: int = 0

    @property
    def spread(self) -> float:
        """The slowest round's median latency over the fastest one's; 1 where there are no rounds."""
        return max(self.rounds_p50_ms) / min(self.rounds_p50_ms) if self.rounds_p50_ms else 1.0

    @property
    def noisy(self) -> bool:
        """Whether the rounds disagree so much that something else was at work on the machine."""
        return self.spread > 1.5


FindingStatus = Literal["pass", "fail", "inconclusive", "not applicable", "not executed here"]


class Finding(Record):
    """One gate's answer about one engine."""

    gate: str
    status: FindingStatus
    message: str
    value: float | None = None
    threshold: float | None = None
    n: int | None = None


VerdictStatus = Literal["pass", "fail", "inconclusive", "not executed here"]


class EngineVerdict(Record):
    """All findings of one engine and what follows from them."""

    engine: str
    engine_digest: str
    required: bool
    serving: bool
    status: VerdictStatus
    findings: tuple[Finding, ...]


class Verdict(Record):
    """Whether this candidate may be asked for approval. Anything but `pass` is a rejection."""

    status: Literal["pass", "fail", "inconclusive"]
    serving_engine: str
    engines: tuple[EngineVerdict, ...]
    reasons: tuple[str, ...]
    """Why it is not a pass; empty on a pass."""
    policy_digest: str


class DecisionRule(Record):
    """When an answer is given and when it is "unsure": `unsure` below `threshold` of the calibrated confidence."""

    threshold: float = Field(ge=0, le=1)
    target_accuracy: float
    """Accuracy that the answered images of the valid split had to reach."""
    num_valid: int
    coverage: Estimate
    """Share of the test images that are answered."""
    accuracy: Estimate | None
    """Accuracy on the answered test images; absent when none is answered."""


class Release(Record):
    """What goes live: one engine, how its answers are read, and what production is compared with.

    Files of its folder: `engine/<the engine's files>`, `reference.parquet` (the serving engine's answers on held-out images)
    and `golden.safetensors` (pictures with the answers that every server has to give before it is ready).
    """

    model: str
    engine: Engine
    task: str
    task_settings: dict[str, bool | int | float | str]
    decision: DecisionRule
    reference: FileDigest
    golden: FileDigest
    golden_tolerance: float = Field(gt=0, lt=1)
    """Largest difference of a probability that another processor may make."""

    @property
    def files(self) -> tuple[FileDigest, ...]:
        """Every file of the release's folder."""
        engine = tuple(file.model_copy(update={"name": f"engine/{file.name}"}) for file in self.engine.files)
        return (*engine, self.reference, self.golden)


Role = Literal["champion", "canary", "shadow"]


class Route(Record):
    """One release that answers, and for which share of the requests."""

    release: str
    """Digest of the Release."""
    version: str
    """Version of the registered model it is made of."""
    role: Role
    weight: float = Field(ge=0, le=1)


class Routes(Record):
    """What a model's servers serve: a projection of the ledger's champion, ordered by `generation`."""

    model: str
    generation: int = Field(ge=1)
    """Sequence number of the ledger row that made it; a server never goes back to a smaller one."""
    routes: tuple[Route, ...] = Field(min_length=1)


class WindowFacts(Record):
    """Which predictions were looked at, and what was left out. Times are UTC, ISO 8601, by ingest time."""

    model: str
    version: str
    """Version of the registered model whose answers were looked at."""
    release: str
    since: str
    until: str
    """Exclusive."""
    rows: int
    """Predictions of this release in the window, each once."""
    judged: int
    """How many of them were compared: rows that are whole, one an image, at most as many as the policy's sample."""
    distinct_images: int
    """Images that the whole rows are about."""
    duplicates: int = 0
    """Rows that the log held twice."""
    malformed: int = 0
    """Rows without finite answers or of another shape; never compared."""
    other_releases: int = 0
    """Rows of releases that answered in the window as well; they have references of their own."""
    lost: int = 0
    """Predictions that the log itself says it lost."""
    problems: tuple[str, ...] = ()
    """Parts of the log that could not be read, or say what cannot be."""
    content: str
    """Digest over the ids of the rows: equal rows, equal content, in whatever order they came."""


ShiftStatus = Literal["pass", "drift", "inconclusive"]


class Shift(Record):
    """One detector's answer about one window."""

    detector: str
    status: ShiftStatus
    message: str
    statistic: str
    value: float | None = None
    threshold: float | None = None
    """Value that is exceeded without any drift in at most the detector's share of `alpha` of the windows."""
    p_value: float | None = None
    effect: float | None = None
    effect_unit: str = ""
    material_effect: float | None = None
    """Smallest effect that matters, by the policy."""
    smallest_shown: float | None = None
    """Smallest effect that this window would have shown in 80 % of the cases."""
    n: int = 0
    details: dict[str, float] = {}
    """Value by column, where the detector looks at several."""


DriftStatus = Literal["pass", "drift", "inconclusive", "no data"]
Diagnosis = Literal["none", "broken input", "appearance", "class mix", "content", "confidence"]


class DriftVerdict(Record):
    """Whether a window of production looks like the reference of its release."""

    window: WindowFacts
    status: DriftStatus
    diagnosis: Diagnosis = "none"
    reasons: tuple[str, ...]
    shifts: tuple[Shift, ...] = ()
    alpha: float
    """Share of windows without drift that may be called drift, over all detectors together."""
    policy: str
    """Digest of the configuration it was judged with."""
    reference: str
    """sha256 of the reference sample."""

    @property
    def detectors(self) -> tuple[str, ...]:
        """Detectors that saw drift."""
        return tuple(shift.detector for shift in self.shifts if shift.status == "drift")


class Lineage(Record):
    """Where a model comes from, as it is written into MLflow and the ledger."""

    run_id: str
    recipe: str
    data_version: str
    git_commit: str
    git_dirty: bool
    code_version: str
    config_digest: str
    lock_digest: str


class Candidate(Record):
    """A registered model version that waits for a person's approval."""

    model: str
    version: str
    candidate_digest: str
    mlflow_run_id: str
    ledger_seq: int


class Rejection(Record):
    """A model that was judged and refused; the evidence is kept."""

    model: str
    status: Literal["fail", "inconclusive"]
    reasons: tuple[str, ...]
    candidate_digest: str
    mlflow_run_id: str
    ledger_seq: int


def compare(value: float | None, threshold: float, *, at_least: bool) -> Literal["pass", "fail", "inconclusive"]:
    """The one comparison of a gate. A missing or non-finite value or threshold is inconclusive, never a pass."""
    if value is None or not math.isfinite(value) or not math.isfinite(threshold):
        return "inconclusive"
    met = value >= threshold if at_least else value <= threshold
    return "pass" if met else "fail"


def compare_interval(estimate: Estimate | None, floor: float) -> Literal["pass", "fail", "inconclusive"]:
    """Three-way comparison of an estimate with a floor.

    Pass when the whole 95 % interval lies at or above the floor, fail when the whole interval lies below it,
    else inconclusive: the images do not decide.
    """
    if estimate is None or not all(math.isfinite(v) for v in (estimate.low, estimate.value, estimate.high, floor)):
        return "inconclusive"
    if estimate.low >= floor:
        return "pass"
    return "fail" if estimate.high < floor else "inconclusive"


def shared_classes(ours: Sequence[str], theirs: Sequence[str]) -> tuple[str, ...]:
    """The classes that both know, in the order of `ours`."""
    known = set(theirs)
    return tuple(name for name in ours if name in known)


_MOST_IMAGES = 10_000_000


def enough(decides: Callable[[int], bool], n: int) -> int | None:
    """About how many, more than the `n` that are there, it takes until `decides` holds, rounded up to two digits.

    None when ten million would not do: then the measured value lies on the limit itself.
    """
    high = n + 1
    while not decides(high):
        high *= 2
        if high > _MOST_IMAGES:
            return None
    low = max(n, high // 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle, high)
    step = int(10 ** max(0, len(str(high)) - 2))
    return -(-high // step) * step


def too_few(what: str, n: int, needed: int | None, *, exactly: bool = False) -> str:
    """Why something is inconclusive and what would decide it, in the one sentence for all that is.

    `needed` is the number that would decide, estimated by `enough` or demanded `exactly`; None when no number would.
    """
    if needed is None:
        return f"{n} {what} do not decide, and no number of them would as long as the value lies on the limit itself"
    return f"too few {what} to decide: there are {n}, {'' if exactly else 'about '}{needed} would do"


class Progress(Protocol):
    """Told how far a long operation is; silent by default."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


def silent(done: int, total: int, note: str = "") -> None:
    """The Progress that shows nothing."""


class MetricSink(Protocol):
    """Receives live training metrics; must never block or fail training."""

    def log(self, epoch: int, metrics: Mapping[str, float]) -> None: ...


class NullSink:
    """The MetricSink that keeps nothing."""

    def log(self, epoch: int, metrics: Mapping[str, float]) -> None:
        return None


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


@dataclass(frozen=True)
class Sample:
    """Answers on n images as detectors see them, rows aligned."""

    statistics: npt.NDArray[np.float64]
    """(n, len(STATISTICS)), each in [0, 1]."""
    confidence: npt.NDArray[np.float64]
    predicted: npt.NDArray[np.int64]
    """Index of the likeliest class."""
    embeddings: npt.NDArray[np.float32]
    """(n, embedding_dim)."""
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.confidence)


class Detector(Protocol):
    """One way in which production can differ from the reference; its fields are its settings."""

    @property
    def draws(self) -> int:
        """How many draws without drift its threshold is taken from; a share of alpha below one of them has none."""
        ...

    @property
    def columns(self) -> Mapping[str, str]:
        """Columns it wants measured by Evidently, with the name of the statistic; empty for one that measures itself."""
        ...

    def detect(
        self, reference: Sample, window: Sample, measured: Mapping[str, float], *, alpha: float, seed: int
    ) -> Shift: ...
