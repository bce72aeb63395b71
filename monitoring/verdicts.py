"""Records of monitoring: the window that was judged, each detector's answer, the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from components.contracts.errors import MonitoringError
from components.contracts.families import Task
from components.contracts.records import Record
from components.contracts.wording import counted

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


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


@dataclass(frozen=True)
class Sample:
    """Answers on n images as detectors see them, rows aligned."""

    statistics: npt.NDArray[np.float64]
    """(n, len(STATISTICS)), each in [0, 1]."""
    columns: Mapping[str, npt.NDArray[Any]]
    """What the task says of each answer: numbers, or text for categories; `confidence` and `predicted` among them."""
    embeddings: npt.NDArray[np.float32]
    """(n, embedding_dim)."""
    classes: tuple[str, ...]
    """What the release answers about."""

    def __len__(self) -> int:
        return len(self.embeddings)


def columns_of(
    task: Task, probabilities: npt.NDArray[np.float64], classes: tuple[str, ...]
) -> Mapping[str, npt.NDArray[Any]]:
    """The task's columns of n answers; raises MonitoringError unless they are n values each, with those that always are."""
    found = task.drift_columns(probabilities, classes)
    for name in ("confidence", "predicted", *found):
        if name not in found or len(found[name]) != len(probabilities):
            told = f"{len(found[name])} values" if name in found else "no values"
            wanted = counted(len(probabilities), "answer")
            raise MonitoringError(f"the task's drift columns have {told} of {name!r} for {wanted}; expected one an answer")
    return found


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
