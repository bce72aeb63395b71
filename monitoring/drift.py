"""A window against the reference: every detector answers, and the answers become one verdict.

Pass, drift, inconclusive or no data; a window that shows nothing because it could not have shown anything is inconclusive,
and a gap is no data. Each detector gets its part of `alpha`, so all of them together alarm without cause in at most that
share of the windows (Bonferroni).
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from components import plugins
from components.contracts.errors import ConfigError
from components.contracts.records import Record, sha256_text
from components.contracts.verdicts import too_few
from components.contracts.wording import counted
from components.images import STATISTICS
from monitoring.evidently_report import Measured, measure
from monitoring.verdicts import Detector, Diagnosis, DriftStatus, DriftVerdict, Sample, Shift, WindowFacts
from monitoring.window import Window

_CONTRAST = STATISTICS.index("contrast")
_EMPTY_CONTRAST = 0.02
"""Five grey levels of 255: below it a picture shows nothing to anybody."""


class DetectorConfig(Record):
    """One detector and its settings."""

    detector: str
    settings: dict[str, bool | int | float | str] = {}


class DriftPolicy(Record):
    """What is looked at, and when it is called drift."""

    alpha: float = Field(default=0.01, gt=0, lt=0.5)
    """Share of windows without drift that may be called drift, over all detectors together."""
    min_images: int = Field(default=50, ge=10)
    """With fewer, nothing is said."""
    most_images: int = Field(default=20_000, ge=200, le=20_000)
    """Images that are compared at most; Evidently's cost grows with them, what is found does not change any more."""
    min_reference: int = Field(default=300, ge=50)
    """Images of the reference, with fewer of which a threshold promises more than it holds."""
    max_malformed_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of rows without usable answers, above which a quiet window is no pass."""
    max_lost_share: float = Field(default=0.10, ge=0, lt=1)
    """Share of predictions that the log lost, above which a quiet window is no pass."""
    detectors: tuple[DetectorConfig, ...] = Field(
        default=(
            DetectorConfig(detector="image_statistics"),
            DetectorConfig(detector="confidence"),
            DetectorConfig(detector="predicted_classes"),
            DetectorConfig(detector="embeddings"),
        ),
        min_length=1,
    )


def check(policy: DriftPolicy) -> None:
    """Raise ConfigError unless every detector exists, takes its settings and is named once."""
    names = [config.detector for config in policy.detectors]
    if len(names) != len(set(names)):
        raise ConfigError("a detector is named twice in the drift policy; name each once")
    for config in policy.detectors:
        member: Detector = plugins.load("detectors", config.detector, config.settings)
        share = policy.alpha / len(policy.detectors)
        if (member.draws + 1) * share < 1:
            least = len(policy.detectors) / (member.draws + 1)
            raise ConfigError(
                f"alpha {policy.alpha:g} is finer than the {member.draws} draws of {config.detector!r} can tell; with "
                f"{len(policy.detectors)} detectors use at least {least:.4f}, or more draws"
            )


def judge(
    reference: Sample, window: Window, policy: DriftPolicy, *, reference_sha256: str
) -> tuple[DriftVerdict, Measured | None]:
    """The verdict about a window, and Evidently's report where there was enough to compare."""
    facts = window.facts

    def verdict(
        status: DriftStatus, reasons: Sequence[str], shifts: Sequence[Shift] = (), diagnosis: Diagnosis = "none"
    ) -> DriftVerdict:
        return DriftVerdict(
            window=facts,
            status=status,
            diagnosis=diagnosis,
            reasons=tuple(reasons),
            shifts=tuple(shifts),
            alpha=policy.alpha,
            policy=policy.digest(),
            reference=reference_sha256,
        )

    holes = _holes(facts, policy)
    if facts.rows == 0:
        also = f"; {counted(facts.other_releases, 'prediction')} of other releases" if facts.other_releases else ""
        return verdict("no data", [f"no prediction of version {facts.version} in this window{also}", *holes]), None
    repeated = _repeated(facts, policy)
    if repeated is not None:
        why = f"{repeated.message}: a camera that is stuck, or a client that repeats itself"
        return verdict("drift", [why, *holes], [repeated], "broken input"), None
    if facts.judged < policy.min_images:
        few = too_few("images with usable answers", facts.judged, policy.min_images, exactly=True)
        return verdict("inconclusive", [few, *holes]), None
    if len(reference) < policy.min_reference:
        small = too_few("images in the release's reference", len(reference), policy.min_reference, exactly=True)
        return verdict("inconclusive", [f"{small}; add test images and train again", *holes]), None
    members: list[Detector] = [plugins.load("detectors", c.detector, dict(c.settings)) for c in policy.detectors]
    measured = _measured(reference, window, members)
    values = measured.values if measured is not None else {}
    seed = int(sha256_text(f"{reference_sha256}/{facts.content}")[:12], 16)
    shifts = [
        member.detect(reference, window.sample, values, alpha=policy.alpha / len(members), seed=seed) for member in members
    ]
    drifted = [shift for shift in shifts if shift.status == "drift"]
    unsure = [shift for shift in shifts if shift.status == "inconclusive"]
    if drifted:
        diagnosis, words = diagnose(reference, window.sample, drifted)
        reasons = [f"{shift.detector}: {shift.message}" for shift in drifted]
        return verdict("drift", [*reasons, *words, *holes], shifts, diagnosis), measured
    if unsure or holes:
        reasons = [f"{shift.detector}: {shift.message}" for shift in unsure]
        return verdict("inconclusive", [*reasons, *holes], shifts), measured
    return verdict("pass", ["every detector is quiet, and would have shown what matters"], shifts), measured


def _measured(reference: Sample, window: Window, members: Sequence[Detector]) -> Measured | None:
    facts = window.facts
    methods = {column: method for member in members for column, method in member.columns.items()}
    at = datetime.datetime.fromisoformat(facts.until)
    return measure(reference, window.sample, methods, name=f"{facts.model} {facts.since}", at=at) if methods else None


def draw_report(reference: Sample, window: Window) -> Measured | None:
    """Evidently's report of every column, for a person: where the verdict needed none of them.

    Raises what Evidently raises.
    """
    columns = ("image_statistics", "confidence", "predicted_classes")
    return _measured(reference, window, [plugins.load("detectors", name, {}) for name in columns])


def _holes(facts: WindowFacts, policy: DriftPolicy) -> list[str]:
    """What is missing from a window so that its silence proves nothing."""
    found = [f"part of the log could not be read: {problem}" for problem in facts.problems]
    if facts.rows and facts.malformed > policy.max_malformed_share * facts.rows:
        found.append(
            f"{facts.malformed} of {counted(facts.rows, 'prediction')} have no finite answers of this release's shape"
        )
    if facts.lost > policy.max_lost_share * (facts.rows + facts.other_releases + facts.lost):
        found.append(f"the log lost {counted(facts.lost, 'prediction')} in this time")
    return found


def _repeated(facts: WindowFacts, policy: DriftPolicy) -> Shift | None:
    """Many predictions about next to no images: nothing can be compared, and that is the finding."""
    whole = facts.rows - facts.malformed
    if whole < 2 * policy.min_images or facts.distinct_images >= policy.min_images:
        return None
    share = 1 - facts.distinct_images / whole
    if share < 0.9:
        return None
    return Shift(
        detector="repetition",
        status="drift",
        message=f"{counted(whole, 'prediction')} about {counted(facts.distinct_images, 'image')} only",
        statistic="share of repeated images",
        value=share,
        threshold=0.9,
        effect=share,
        effect_unit="share of predictions",
        n=whole,
    )


def diagnose(reference: Sample, window: Sample, drifted: Sequence[Shift]) -> tuple[Diagnosis, list[str]]:
    """What kind of drift it is, and what that means for what to do."""
    floor = max(_EMPTY_CONTRAST, 0.25 * float(np.quantile(reference.statistics[:, _CONTRAST], 0.01)))
    empty = float((window.statistics[:, _CONTRAST] < floor).mean())
    if empty >= 0.5:
        return "broken input", [
            f"{empty:.0%} of the pictures show next to nothing (contrast under {floor:.3f}): look at the camera, a model "
            f"cannot learn from them"
        ]
    kinds = {shift.detector for shift in drifted}
    if "image_statistics" in kinds:
        return "appearance", ["light, focus or noise changed: label some of these pictures, or mend the camera"]
    if kinds == {"predicted_classes"}:
        return "class mix", ["the classes come in other shares: label some of these pictures before anything is retrained"]
    if kinds == {"confidence"}:
        return "confidence", ["the model is sure of other things than it was: label some of these pictures"]
    return "content", ["the pictures show something else, though they look alike: label some of them"]


def as_json(verdict: DriftVerdict) -> dict[str, Any]:
    """The verdict for machines, with the names of the detectors that saw drift."""
    return verdict.to_json() | {"detectors": list(verdict.detectors)}
