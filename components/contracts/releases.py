"""Records of what serves: release, decision rule, routes."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
)

from components.contracts.models import Engine
from components.contracts.records import FileDigest, Record
from components.contracts.verdicts import Estimate


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
