"""Records of what serves: release, decision rule, routes."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from components.contracts.models import Engine
from components.contracts.records import FileDigest, Record
from components.contracts.verdicts import Estimate, compare_budget

NEVER = math.nextafter(1.0, 2.0)
"""A threshold that no confidence reaches."""


class CriticalClass(Record):
    """A class that pictures of others may seldom be answered as: such an answer is sure from a threshold of its own."""

    name: str
    rate: float = Field(gt=0, lt=1)
    """Largest share of the pictures of other classes that may be answered so surely."""
    threshold: float = Field(ge=0, le=NEVER)
    """At least the rule's own; NEVER where none keeps the rate."""
    valid: Estimate
    """The share on the valid split, which chose the threshold; the whole interval lies at or below the rate."""
    test: Estimate | None
    """The same on test; None where that has no picture of another class."""
    found: Estimate | None
    """Share of the test pictures of this class that are answered so surely: the price; None where there are none."""

    def told(self) -> str:
        """What it came to, in one sentence for whoever decides."""
        sure = f"is a sure answer from confidence {self.threshold:.4f} on"
        if self.threshold >= NEVER:
            sure = "is never a sure answer, as no threshold keeps the rate on valid"
        kept = "there was none in test"
        if self.test is not None:
            status = {"pass": "kept", "fail": "not kept", "inconclusive": "not decided by these test pictures"}
            kept = f"{_percent(self.test)} in test, {status[compare_budget(self.test, self.rate)]}"
        found = f"; of its own test pictures {_percent(self.found)} are found so" if self.found is not None else ""
        return (
            f"Critical class {self.name!r} {sure}. Of the pictures of other classes at most {100 * self.rate:g} % may be "
            f"answered so: {kept}{found}"
        )


def _percent(share: Estimate) -> str:
    return f"{share.value:.2%} [{share.low:.2%}, {share.high:.2%}] (n={share.n})"


class DecisionRule(Record):
    """When an answer is given and when it is "unsure": `unsure` below `threshold` of the calibrated confidence.

    An answer that names a critical class has to reach the threshold of that class, too.
    """

    threshold: float = Field(ge=0, le=1)
    target_accuracy: float
    """Accuracy that the answered images of the valid split had to reach."""
    num_valid: int
    coverage: Estimate
    """Share of the test images that are answered."""
    accuracy: Estimate | None
    """Accuracy on the answered test images; absent when none is answered."""
    critical: tuple[CriticalClass, ...] = ()
    """Left out of JSON where there are none: releases are named by digests from before the field."""

    @property
    def class_thresholds(self) -> dict[str, float]:
        """The thresholds of the critical classes, by name."""
        return {each.name: each.threshold for each in self.critical}

    @model_serializer(mode="wrap")
    def _without_the_field(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if not self.critical:
            del values["critical"]
        return values


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
