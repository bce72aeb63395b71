"""Records of what a person looks at before deciding: which pictures change, and for whom it gets better or worse."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import SerializerFunctionWrapHandler, model_serializer

from components.contracts.records import FileDigest, Record
from components.contracts.verdicts import Estimate, SliceFigure

Shown = Literal["lost", "won", "surest errors", "least sure"]
"""Why a test picture is shown: only the champion is right, only the candidate is, wrong and sure, or right and unsure."""


class Neighbour(Record):
    """A training picture that the engine's embedding puts near a test picture."""

    path: str
    label: str
    similarity: float
    """Cosine."""
    thumbnail: str


class ShownPicture(Record):
    """One test picture, with what was answered to it and why it is shown."""

    why: Shown
    sha256: str
    path: str
    label: str
    predicted: str
    confidence: float
    champion_predicted: str = ""
    """Empty where there is no champion, or where it was not asked about this picture."""
    champion_confidence: float | None = None
    thumbnail: str = ""
    """A file of the evidence; empty where the picture was not there any more."""
    saliency: str = ""
    """A file: the picture as the network sees it, with what the answer rests on; empty where there is none."""
    neighbours: tuple[Neighbour, ...] = ()


class Flips(Record):
    """The answers of candidate and champion to the same test pictures."""

    both: int
    won: int
    """Right by the candidate alone."""
    lost: int
    """Right by the champion alone."""
    neither: int
    difference: Estimate
    """Candidate - champion, of the share that is right, picture by picture."""


class Cluster(Record):
    """The pictures nearest to the middle of a cluster of the embedding, for a person to see what it is."""

    name: str
    pictures: tuple[str, ...]
    """Paths in the data."""
    thumbnails: tuple[str, ...]


class CandidateEvidence(Record):
    """What a person looks at; it decides nothing that the gates have not decided."""

    engine: str
    """The engine whose answers are shown: the one that serves, or the reference where that could not run."""
    engine_digest: str
    champion_digest: str
    """Of the champion's engine; `none` where there is none that answered."""
    test_digest: str
    num_images: int
    flips: Flips | None
    pictures: tuple[ShownPicture, ...]
    slices: tuple[SliceFigure, ...]
    """The worst first."""
    clusters: tuple[Cluster, ...]
    saliency_by: str
    """What made the saliency maps; empty where nothing did."""
    notes: tuple[str, ...]
    """What is missing, and why."""
    files: tuple[FileDigest, ...]
    """flips.parquet, the pictures and the saliency maps."""


class ClassCost(Record):
    """The answers to the test images of one class, before passes and after."""

    name: str
    before: float
    """Share that was right."""
    after: float
    difference: Estimate
    """after - before, image by image."""
    p_worse: float | None = None
    """Of being worse than before, one-sided, after Holm's correction for all classes; None, and absent in JSON, where it was
    not computed yet."""

    @model_serializer(mode="wrap")
    def _without_the_field(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if self.p_worse is None:
            del values["p_worse"]
        return values


class PassesCost(Record):
    """What passes cost on test and bought in milliseconds: the network as it was trained beside what they made of it.

    Both as engines of one target and precision, asked about the same images and timed in turns on one machine.
    """

    engine: str
    engine_digest: str
    before_digest: str
    """Of the engine of the network as it was trained."""
    test_digest: str
    answers: Flips | None
    """Here won and lost are right after alone and before alone; None where one of them did not answer."""
    by_class: tuple[ClassCost, ...]
    """The one that lost most first."""
    p50_before_ms: float | None
    p50_after_ms: float | None
    speedup: Estimate | None
    """before / after: the median of the rounds, with the range of the rounds; n is how many there were."""
    machine: str
    engine_bytes_before: int
    engine_bytes_after: int
    notes: tuple[str, ...]
    """What could not be compared, and why."""
