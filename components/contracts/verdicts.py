"""Records of judgement: evaluations, measurements, findings, verdicts, and the comparisons that decide them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from components.contracts.records import FileDigest, Record


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
    beyond_test: FileDigest | None = None
    """Logits on the valid and calibration images, for parity, which needs no labels; only of engines that are asked.

    Left out of JSON where there are none: approvals are bound to the digests of records from before the field.
    """

    @model_serializer(mode="wrap")
    def _without_the_field(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if self.beyond_test is None:
            del values["beyond_test"]
        return values


class Robustness(Record):
    """What one engine answered on the same test images as they are and changed; deterministic, so it is cached by content.

    The variants are those of components/corruptions.py.
    """

    engine: str
    engine_digest: str
    test_digest: str
    status: Literal["evaluated", "not executed here", "not comparable"]
    """As of an Evaluation."""
    reason: str = ""
    """Why it was not executed, or what is wrong with its answers; empty when nothing is."""
    num_images: int = 0
    corrupted: Estimate | None = None
    """Share of right answers over all corruptions; `n` counts images, each of which was corrupted in every way."""
    right: dict[str, Estimate] = {}
    """Share of right answers by variant, the clean ones among them."""
    unchanged: dict[str, Estimate] = {}
    """By behaviour, the share of images that are answered as they are without it."""
    answers: FileDigest | None = None


class FoldEstimate(Record):
    """What a recipe makes of its data, by k folds: every image is answered once, by a model that never saw it.

    It says nothing of the model that is judged, and gates do not read it. The intervals are those of the images; how much
    one training differs from another is in the spread of the folds.
    """

    folds: int
    num_images: int
    metrics: dict[str, Estimate]
    per_class: tuple[ClassMetrics, ...]
    by_fold: tuple[Estimate, ...]
    """The headline metric of each fold."""

    def told(self, headline: str) -> str:
        """The estimate in one sentence, wherever a person reads of it."""
        values = [fold.value for fold in self.by_fold]
        return (
            f"Estimate of the recipe: {headline} {self.metrics[headline]}, in {self.folds} folds from {min(values):.4f} to "
            f"{max(values):.4f}; every image was answered by a model that never saw it. It is no figure of this model"
        )


class SliceTable(Record):
    """Which slices the test images are in: groups that a person can name, such as the darkest quarter or one camera."""

    engine: str
    """Whose embeddings the clusters are of."""
    engine_digest: str
    test_digest: str
    num_images: int
    kinds: tuple[str, ...]
    notes: tuple[str, ...]
    """Why there is nothing of a kind."""
    table: FileDigest


class SliceFigure(Record):
    """How a model does in one slice; the p-values are corrected for all slices that were looked at."""

    kind: str
    name: str
    n: int
    accuracy: Estimate
    """The share that is right; as the other estimates here, of the task's headline metric."""
    to_rest: Estimate | None
    """The difference to all other test images; None where there are none."""
    champion: Estimate | None = None
    to_champion: Estimate | None = None
    """The difference to the champion, image by image; None where there is none to compare with."""
    p_below_rest: float = 1.0
    """Of being worse than the rest, one-sided."""
    p_below_champion: float | None = None


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
    latency_p99: Estimate | None = None
    """The p99 with its interval, in milliseconds; `n` is the number of runs. Older records have none."""
    rounds_p50_ms: tuple[float, ...] = ()
    rounds_p99_ms: tuple[float, ...] = ()
    memory_mb: float | None = None
    """What loading it and answering one image adds to a process of its own, at the height, in 10^6 bytes; if wanted."""
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
    """Images or runs that it rests on. What is inconclusive without them measured nothing, and nobody may except it."""


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
    """Whether this candidate may be asked for approval. Anything but `pass` is a rejection, or waits for an exception."""

    status: Literal["pass", "fail", "inconclusive"]
    serving_engine: str
    engines: tuple[EngineVerdict, ...]
    reasons: tuple[str, ...]
    """Why it is not a pass; empty on a pass."""
    policy_digest: str


NEVER_EXCEPTED = frozenset({"parity", "evaluation", "export", "serving", "serves"})
"""Findings that nobody may sign away: that an engine answers as it was trained, was executed, meets the limits, serves."""


def exceptable(verdict: Verdict) -> tuple[str, ...]:
    """The gates that alone keep a verdict from a pass, and that a person may except; none where anything else does, too.

    Each has to be inconclusive for want of evidence: it measured something on `n` images or runs, and they do not decide.
    """
    deciding = [engine for engine in verdict.engines if engine.serving or engine.required]
    if verdict.status != "inconclusive" or not any(engine.serving for engine in deciding):
        return ()
    gates: set[str] = set()
    for engine in deciding:
        if not any(finding.status == "pass" for finding in engine.findings):
            return ()
        for finding in engine.findings:
            if finding.status == "inconclusive" and finding.n and finding.gate not in NEVER_EXCEPTED:
                gates.add(finding.gate)
            elif finding.status not in ("pass", "not applicable"):
                return ()
    return tuple(sorted(gates))


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
    study_digest: str = ""
    """Of the search that found the recipe's values; left out where there was none."""
    choice_digest: str = ""
    """Of the choice that the recipe's values come from; left out where there was none."""

    @model_serializer(mode="wrap")
    def _without_what_was_not(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        return {key: value for key, value in values.items() if value or key not in ("study_digest", "choice_digest")}


class Candidate(Record):
    """A registered model version that waits for a person's approval."""

    model: str
    version: str
    candidate_digest: str
    mlflow_run_id: str
    ledger_seq: int


class Undecided(Record):
    """A registered model version that some gates did not decide on; a person may sign an exception for these."""

    model: str
    version: str
    gates: tuple[str, ...]
    reasons: tuple[str, ...]
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


Outcome = Candidate | Undecided | Rejection
"""What becomes of a model that was judged."""


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


def compare_budget(estimate: Estimate | None, budget: float) -> Literal["pass", "fail", "inconclusive"]:
    """Three-way comparison of an estimate with what it may be at most; see `compare_interval`."""
    if estimate is None or not all(math.isfinite(v) for v in (estimate.low, estimate.value, estimate.high, budget)):
        return "inconclusive"
    if estimate.high <= budget:
        return "pass"
    return "fail" if estimate.low > budget else "inconclusive"


def shared_classes(ours: Sequence[str], theirs: Sequence[str]) -> tuple[str, ...]:
    """The classes that both know, in the order of `ours`."""
    known = set(theirs)
    return tuple(name for name in ours if name in known)


_MOST_IMAGES = 10_000_000


def fewest(decides: Callable[[int], bool], *, above: int = 0) -> int | None:
    """The smallest number above `above` for which `decides` holds; it has to hold for every larger one, too.

    None when ten million would not do.
    """
    high = above + 1
    while not decides(high):
        high *= 2
        if high > _MOST_IMAGES:
            return None
    low = max(above, high // 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle, high)
    return high


def enough(decides: Callable[[int], bool], n: int) -> int | None:
    """About how many, more than the `n` that are there, it takes until `decides` holds, rounded up to two digits.

    None when ten million would not do: then the measured value lies on the limit itself.
    """
    found = fewest(decides, above=n)
    if found is None:
        return None
    step = int(10 ** max(0, len(str(found)) - 2))
    return -(-found // step) * step


def too_few(what: str, n: int, needed: int | None, *, exactly: bool = False) -> str:
    """Why something is inconclusive and what would decide it, in the one sentence for all that is.

    `needed` is the number that would decide, estimated by `enough` or demanded `exactly`; None when no number would.
    """
    if needed is None:
        return f"{n} {what} do not decide, and no number of them would as long as the value lies on the limit itself"
    return f"too few {what} to decide: there are {n}, {'' if exactly else 'about '}{needed} would do"
