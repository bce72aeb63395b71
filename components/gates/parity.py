"""Parity: the shipped engine answers like the trained module, image by image."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from components.contracts.families import Evidence, Least
from components.contracts.models import Precision
from components.contracts.verdicts import Finding, compare, too_few
from components.contracts.wording import counted

_MIN_AGREEMENT: dict[Precision, float] = {"fp32": 0.999, "fp16": 0.995, "int8": 0.98}


class Gate(BaseModel):
    """Share of equal answers for every precision, and for fp32 also the largest |logit difference|.

    A quantised engine's logits may differ by more than any useful bound while its answers agree, so the bound on logits
    is fp32's alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    min_agreement: dict[Precision, Annotated[float, Field(gt=0, le=1)]] = _MIN_AGREEMENT
    """By precision; one that is not named keeps its default."""
    max_logit_difference: float = Field(default=1e-2, gt=0)
    min_images: int = Field(default=100, ge=1)

    @field_validator("min_agreement")
    @classmethod
    def _keep_the_others(cls, given: dict[Precision, float]) -> dict[Precision, float]:
        return {**_MIN_AGREEMENT, **given}

    def judge(self, evidence: Evidence) -> Finding:
        answers, reference = evidence.answers, evidence.reference
        if answers is None or reference is None:
            whose = "this engine" if answers is None else "the torch reference"
            return _inconclusive(f"there are no answers of {whose} to compare")
        if answers.image_ids != reference.image_ids:
            return _inconclusive("the engine and the reference answered different images")
        n = len(answers.image_ids)
        if n < self.min_images:
            return _inconclusive(too_few("test images", n, self.min_images, exactly=True), n=n)
        if not (np.isfinite(answers.logits).all() and np.isfinite(reference.logits).all()):
            return _inconclusive("some answers are not finite numbers", n=n)
        floor = self.min_agreement.get(evidence.engine.precision)
        if floor is None:
            return _inconclusive(f"no min_agreement is set for precision {evidence.engine.precision}", n=n)
        agreement = float(answers.agree(reference).mean())
        difference = float(np.abs(answers.logits - reference.logits).max())
        status = compare(agreement, floor, at_least=True)
        text = (
            f"equal answers on {agreement:.4%} of {counted(n, 'image')} (floor {floor:.1%}), "
            f"largest |logit difference| {difference:.2g}"
        )
        if evidence.engine.precision == "fp32":
            text += f" (limit {self.max_logit_difference:g})"
            if status == "pass":
                status = compare(difference, self.max_logit_difference, at_least=False)
        return Finding(gate="parity", status=status, message=text, value=agreement, threshold=floor, n=n)

    def least(self) -> Least:
        return Least(images=self.min_images)


def _inconclusive(message: str, n: int | None = None) -> Finding:
    return Finding(gate="parity", status="inconclusive", message=message, n=n)
