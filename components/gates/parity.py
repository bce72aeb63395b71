"""Parity: the shipped engine answers like the trained module, image by image."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from components.contracts.families import Answers, Evidence, Least
from components.contracts.models import Precision
from components.contracts.verdicts import Finding, FindingStatus, compare, enough, fewest, too_few
from components.contracts.wording import counted
from components.intervals import wilson

_MIN_AGREEMENT: dict[Precision, float] = {"fp16": 0.995, "int8": 0.98}


class Gate(BaseModel):
    """In fp32 a bound on |logit difference|; in less, a share of equal answers, which is judged by its 95 % interval.

    fp32 is compared on every image outside training, because that takes no labels. A quantised engine's logits may differ
    by more than any useful bound while its answers agree, and what was chosen by valid and calibration is no proof on them:
    it is compared on the test images alone. It fails when all of the interval lies below `min_agreement`, and passes when
    that is not so and the images prove `min_proven`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    min_agreement: dict[Precision, Annotated[float, Field(gt=0, le=1)]] = _MIN_AGREEMENT
    """By precision; one that is not named keeps its default. That of fp32 decides nothing."""
    min_proven: float = Field(default=0.9, gt=0, lt=1)
    """Share of equal answers that the test images have to prove at 95 %, in less than fp32; 24 of each of 2 classes can."""
    max_logit_difference: float = Field(default=1e-2, gt=0)
    min_images: int = Field(default=40, ge=1)

    @field_validator("min_agreement")
    @classmethod
    def _keep_the_others(cls, given: dict[Precision, float]) -> dict[Precision, float]:
        return {**_MIN_AGREEMENT, **given}

    def judge(self, evidence: Evidence) -> Finding:
        answers, reference = evidence.answers, evidence.reference
        if answers is None or reference is None:
            whose = "this engine" if answers is None else "the torch reference"
            return _finding("inconclusive", f"there are no answers of {whose} to compare")
        pairs = [(answers, reference)]
        if evidence.engine.precision == "fp32":
            mine, theirs = evidence.beyond_test, evidence.reference_beyond_test
            pairs += [(mine, theirs)] if mine is not None and theirs is not None else []
        if any(one.image_ids != other.image_ids for one, other in pairs):
            return _finding("inconclusive", "the engine and the reference answered different images")
        n = sum(len(one.image_ids) for one, _ in pairs)
        what = "images outside training" if len(pairs) > 1 else "test images"
        if n < self.min_images:
            return _finding("inconclusive", too_few(what, n, self.min_images, exactly=True), n=n)
        if not all(np.isfinite(one.logits).all() and np.isfinite(other.logits).all() for one, other in pairs):
            return _finding("inconclusive", "some answers are not finite numbers", n=n)
        if evidence.engine.precision == "fp32":
            return self._by_logits(pairs, n, what)
        return self._by_agreement(answers, reference, self.min_agreement[evidence.engine.precision])

    def _by_logits(self, pairs: list[tuple[Answers, Answers]], n: int, what: str) -> Finding:
        differences = np.concatenate([np.abs(one.logits - other.logits).max(axis=1) for one, other in pairs])
        largest, middle = float(differences.max()), float(np.median(differences))
        different = sum(int((~one.agree(other)).sum()) for one, other in pairs)
        text = (
            f"largest |logit difference| {largest:.2g} on {n} {what} (limit {self.max_logit_difference:g}, median "
            f"{middle:.2g}), {counted(different, 'other answer')}; they prove {wilson(n - different, n).low:.1%} equal "
            f"answers"
        )
        status = compare(largest, self.max_logit_difference, at_least=False)
        return _finding(status, text, value=largest, threshold=self.max_logit_difference, n=n)

    def _by_agreement(self, answers: Answers, reference: Answers, floor: float) -> Finding:
        agree = answers.agree(reference)
        n, hits = len(agree), int(agree.sum())
        share = wilson(hits, n)
        text = (
            f"share of equal answers {share}, expected {floor:.1%}; these test images prove {share.low:.1%}, and "
            f"{self.min_proven:.1%} are needed"
        )
        if share.high < floor:
            status: FindingStatus = "fail"
        elif share.low >= self.min_proven:
            status = "pass"
        else:
            status = "inconclusive"
            needed = enough(lambda more: self._decides(hits / n, more, floor), n)
            text += f": {too_few('test images', n, needed)}"
        return _finding(status, text, value=share.value, threshold=floor, n=n)

    def _decides(self, share: float, n: int, floor: float) -> bool:
        """Whether `n` images of which the same share is answered equally would decide."""
        estimate = wilson(round(share * n), n)
        return estimate.high < floor or estimate.low >= self.min_proven

    def least(self) -> Least:
        needed = fewest(lambda n: wilson(n, n).low >= self.min_proven)
        return Least(images=None if needed is None else max(self.min_images, needed), below_fp32_alone=True)


def _finding(
    status: FindingStatus, message: str, *, value: float | None = None, threshold: float | None = None, n: int | None = None
) -> Finding:
    return Finding(gate="parity", status=status, message=message, value=value, threshold=threshold, n=n)
