"""What a detector has to do: be quiet, be loud, and say that it cannot tell, each where that is the right answer."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator

import numpy as np

from components.conformance import Breach
from monitoring.verdicts import Detector, Sample, Shift

_AT = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
_CLASSES = tuple("0123456789")


def detector_breaches(detector: Detector, name: str) -> Iterator[Breach]:
    """Windows of the same data, of data where everything moved, and of too few images, against one reference."""
    reference = _sample(1000, 0)

    def answer(window: Sample) -> Shift:
        methods = detector.columns
        values = {}
        if methods:
            from monitoring.evidently_report import measure

            values = dict(measure(reference, window, methods, name=name, at=_AT).values)
        return detector.detect(reference, window, values, alpha=0.0025, seed=1)

    quiet = answer(_sample(1000, 1))
    moved = _sample(1000, 2, shift=2)
    moved = dataclasses.replace(moved, columns={**moved.columns, "predicted": np.full(1000, "3")})
    loud, few = answer(moved), answer(_sample(20, 1))
    for what, found, expected in (
        ("on 1,000 images of the same data", quiet, "pass"),
        ("on 1,000 images of which everything has moved by two standard deviations", loud, "drift"),
        ("on 20 images of the same data", few, "inconclusive"),
    ):
        if found.status != expected:
            yield Breach("detect", f"answers {found.status!r} {what}; expected {expected!r}")
        if found.detector != name:
            yield Breach("detect", f"answers as detector {found.detector!r} {what}; expected {name!r}, the name of its file")
        absent = [part for part in ("value", "threshold", "effect") if getattr(found, part) is None]
        absent += [part for part in ("effect_unit", "message", "n") if not getattr(found, part)]
        if absent:
            yield Breach("detect", f"leaves {', '.join(absent)} of its answer empty {what}")
    if loud.status == "drift" and not (loud.value or 0) > (loud.threshold or 0):
        yield Breach("detect", f"answers 'drift' with a value of {loud.value}, not above its threshold {loud.threshold}")
    if not (few.smallest_shown or 0) > (quiet.smallest_shown or 0):
        yield Breach("detect", "says that 20 images show as small a shift as 1,000 do (smallest_shown)")
    if answer(_sample(1000, 1)) != quiet:
        yield Breach("detect", "gives two answers about the same window and seed; draw from default_rng(seed) alone")


def _sample(n: int, seed: int, *, shift: float = 0.0) -> Sample:
    """Answers on n grey pictures; `shift` moves brightness, confidence and embeddings, in standard deviations."""
    rng = np.random.default_rng(seed)
    return Sample(
        statistics=rng.normal([0.4 + 0.05 * shift, 0.5, 0.2, 0.0], [0.05, 0.05, 0.03, 0.0], (n, 4)),
        columns={
            "confidence": np.clip(rng.normal(0.9 - 0.03 * shift, 0.03, n), 0, 1),
            "predicted": np.array(_CLASSES)[rng.integers(0, len(_CLASSES), n)],
        },
        embeddings=rng.normal(shift, 1.0, (n, 16)).astype(np.float32),
        classes=_CLASSES,
    )
