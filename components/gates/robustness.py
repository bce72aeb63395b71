"""Robustness: no worse than the champion where the camera is worse, on the same corrupted pictures of the test images.

What is compared is the mean accuracy over all corruptions, picture by picture: the share of a picture's corruptions that is
answered rightly is one number, so a picture counts once however often it is shown. infra/decisions/0026 has the corruptions
and the interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from components.contracts.families import Answers, Corrupted, Evidence, Least
from components.contracts.verdicts import Estimate, Finding, FindingStatus, compare_interval, enough, fewest, too_few
from components.corruptions import BEHAVIOURS, CLEAN, CORRUPTED, CORRUPTIONS, severities
from components.intervals import Floats, PairedScores, mean_interval, paired_interval, wilson

NAME = "robustness"


class Gate(BaseModel):
    """Pass when the 95 % interval of (candidate - champion) lies above `-margin` and all of the floors' lie above them."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    needs_corrupted: ClassVar[bool] = True

    margin: float = Field(default=0.03, gt=0, lt=1)
    """What the mean accuracy on corrupted pictures may lie below the champion's."""
    floor: float | None = Field(default=None, gt=0, lt=1)
    """Smallest mean accuracy on corrupted pictures, whoever the champion is; none where there is none."""
    min_stability: dict[str, Annotated[float, Field(gt=0, lt=1)]] = {}
    """Smallest share of answers that stay as they are, by behaviour: flip, shift, reencoding. Leave out flip where left and
    right differ, as in text."""

    @field_validator("min_stability", mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        unknown = sorted(set(given) - set(BEHAVIOURS)) if isinstance(given, dict) else []
        if unknown:
            raise ValueError(f"unknown behaviour {unknown[0]!r}; expected some of {', '.join(BEHAVIOURS)}")
        return given

    def judge(self, evidence: Evidence) -> Finding:
        parts = [self._beside_champion(evidence)]
        if self.floor is not None or self.min_stability:
            own = _usable(evidence.corrupted, "this engine")
            if isinstance(own, str):
                parts.append(_Part("inconclusive", own))
            else:
                parts += self._by_itself(own, evidence)
        parts = [replace(part, text=f"{part.text}{_left(part, evidence)}") for part in parts]
        statuses = [part.status for part in parts]
        worst: tuple[FindingStatus, ...] = ("fail", "inconclusive", "pass", "not applicable")
        first = next((part for part in parts if part.value is not None), parts[0])
        asked = evidence.corrupted.asked if evidence.corrupted is not None else ""
        return Finding(
            gate=NAME,
            status=next(status for status in worst if status in statuses),
            message="; ".join(dict.fromkeys(part.text for part in parts))
            + (f"; asked was {asked}, which answers alike: parity compares both with the same reference" if asked else ""),
            value=first.value,
            threshold=first.threshold,
            n=first.n,
        )

    def least(self) -> Least:
        images = fewest(lambda n: paired_interval(n, 0, 0, 0)[0] >= -self.margin)
        if self.floor is None and not self.min_stability:
            return Least(images=images, against_champion=True)
        floors = [*([self.floor] if self.floor is not None else []), *self.min_stability.values()]
        own = fewest(lambda n: wilson(n, n).low >= max(floors))
        # The first model alone has no champion beside it.
        return Least(images=None if images is None or own is None else max(images, own))

    def _beside_champion(self, evidence: Evidence) -> _Part:
        if unknown := evidence.champion_unknown(NAME):
            return _Part("inconclusive", unknown)
        if evidence.champion is None:
            return _Part("not applicable", "no version was ever promoted, so there is no champion to compare with")
        own = _usable(evidence.corrupted, "this engine")
        theirs = _usable(evidence.champion_corrupted, "the champion")
        if isinstance(own, str) or isinstance(theirs, str):
            return _Part("inconclusive", own if isinstance(own, str) else str(theirs))
        among = ""
        if own[CLEAN].classes != theirs[CLEAN].classes:
            own = {variant: answers.among(theirs[variant].classes) for variant, answers in own.items()}
            among = f", among the {len(theirs[CLEAN].classes)} classes that both know"
        for variant, answers in own.items():
            other = theirs[variant]
            if answers.image_ids != other.image_ids or answers.labels != other.labels:
                text = "the champion was asked about other corrupted pictures or labels than this engine"
                return _Part("inconclusive", text + among)
        return self._compared(own, theirs, among)

    def _compared(self, own: dict[str, Answers], theirs: dict[str, Answers], among: str) -> _Part:
        first, second = _scores(own), _scores(theirs)
        scores = PairedScores.of(first, second)
        low, high = scores.interval()
        mine, champion, n = float(first.mean()), float(second.mean()), len(first)
        text = (
            f"mean accuracy on {len(CORRUPTED)} corruptions {mine:.4f}, the champion's {champion:.4f}: difference "
            f"{mine - champion:+.4f} [{low:+.4f}, {high:+.4f}] (n={n} images{among}), margin {self.margin:g}"
            f"{_corruption_error(own, theirs)}; without corruption {own[CLEAN].right.mean():.4f}, the champion's "
            f"{theirs[CLEAN].right.mean():.4f}"
        )
        status: FindingStatus = "inconclusive"
        needed = None
        if high < -self.margin:
            status = "fail"
        elif low >= -self.margin:
            status = "pass"
        else:
            needed = enough(lambda size: self._decides(scores, size), n)
            text += f"; {too_few('corrupted images', n, needed)}"
        return _Part(status, text, value=mine - champion, threshold=-self.margin, n=n, needed=needed)

    def _decides(self, scores: PairedScores, size: int) -> bool:
        """Whether `size` images of the same kind would decide."""
        low, high = replace(scores, n=size).interval()
        return high < -self.margin or low >= -self.margin

    def _by_itself(self, own: dict[str, Answers], evidence: Evidence) -> list[_Part]:
        parts = []
        if self.floor is not None:
            told = f"mean {evidence.headline} on {len(CORRUPTED)} corruptions"
            scores = _scores(own)
            at = partial(mean_interval, float(scores.mean()), float(scores.var()))
            parts.append(_met(told, at, len(scores), f"floor {self.floor:g}", self.floor))
        for behaviour, least in self.min_stability.items():
            kept = own[behaviour].agree(own[CLEAN])
            told = f"share of answers that stay the same under {behaviour}"
            at = partial(_share, float(kept.mean()))
            parts.append(_met(told, at, len(kept), f"expected at least {least:g}", least))
        return parts


@dataclass(frozen=True)
class _Part:
    """What one of the conditions came to."""

    status: FindingStatus
    text: str
    value: float | None = None
    threshold: float | None = None
    n: int | None = None
    needed: int | None = None
    """About how many images would decide it."""


def _usable(corrupted: Corrupted | None, whose: str) -> dict[str, Answers] | str:
    """The answers by variant, or why they say nothing."""
    if corrupted is None:
        return f"no corrupted pictures were shown to {whose}"
    if corrupted.reason:
        return f"there are no answers of {whose} on corrupted pictures: {corrupted.reason}"
    wanted = (CLEAN, *CORRUPTED, *BEHAVIOURS)
    missing = [variant for variant in wanted if variant not in corrupted.answers]
    if missing:
        return f"there are no answers of {whose} on pictures with {missing[0]}"
    answers = {variant: corrupted.answers[variant] for variant in wanted}
    clean = answers[CLEAN]
    if len(clean.image_ids) == 0:
        return f"no corrupted pictures were shown to {whose}"
    if any((a.image_ids, a.labels) != (clean.image_ids, clean.labels) for a in answers.values()):
        return f"{whose} was asked about other pictures under one corruption than under another"
    if not all(np.isfinite(found.logits).all() for found in answers.values()):
        return f"some answers of {whose} on corrupted pictures are not finite numbers"
    return answers


def _scores(answers: dict[str, Answers]) -> Floats:
    """The share of each image's corruptions that is answered rightly."""
    found: Floats = np.mean([answers[variant].right for variant in CORRUPTED], axis=0, dtype=np.float64)
    return found


def _corruption_error(own: dict[str, Answers], theirs: dict[str, Answers]) -> str:
    """Hendrycks and Dietterich's mean corruption error: the mean over corruptions of errors as shares of the champion's."""
    ratios = []
    for corruption in CORRUPTIONS:
        mine, champion = (
            sum(1 - float(answers[variant].right.mean()) for variant in severities(corruption)) for answers in (own, theirs)
        )
        if champion > 0:
            ratios.append(mine / champion)
    if not ratios:
        return ""
    left_out = len(CORRUPTIONS) - len(ratios)
    of = f" of the {len(ratios)} corruptions that the champion errs on" if left_out else ""
    return f", mean corruption error{of} {np.mean(ratios):.1%} of the champion's"


def _share(share: float, n: int) -> Estimate:
    return wilson(round(share * n), n)


def _met(what: str, at: Callable[[int], Estimate], n: int, expected: str, floor: float) -> _Part:
    """Whether a floor is met; `at` gives the estimate that n images of the same kind would give."""
    estimate = at(n)
    status = compare_interval(estimate, floor)
    text, needed = f"{what} {estimate}, {expected}", None
    if status == "inconclusive":
        needed = enough(lambda size: compare_interval(at(size), floor) != "inconclusive", n)
        text += f": {too_few('corrupted images', n, needed)}"
    return _Part(status, text, value=estimate.value, threshold=floor, n=n, needed=needed)


def _left(part: _Part, evidence: Evidence) -> str:
    """Where more images could be had at once: not all test images were shown."""
    total, n = evidence.evaluation.num_images, part.n
    if part.needed is None or n is None or n >= total:
        return ""
    return f" (evaluation.robustness_images can take more of the {total} test images)"
