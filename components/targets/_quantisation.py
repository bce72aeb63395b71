"""Int8 with accuracy control: the layers that int8 harms most return to float until the answers are right again.

Ranges come from the calibration split; what int8 costs is measured on the valid split, against the float model's answers.
NNCF's own `quantize_with_accuracy_control` looks at accuracy alone, which lost and won answers leave as it was, has no bound
on its time and does not tell what it returned to float.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from components.contracts.errors import ExportError
from components.contracts.families import ExportRequest
from components.contracts.wording import counted

_FEWEST = 10
_TO_RANK = 64
"""Images that layers are ranked by: those that int8 answers most differently."""
_BATCH = 32

Logits = npt.NDArray[np.float32]
Images = npt.NDArray[np.uint8]
ModelT = TypeVar("ModelT")


class Quantised(BaseModel):
    """Settings of int8, the same for every target that has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    max_calibration_images: int = Field(default=300, ge=_FEWEST)
    max_valid_images: int = Field(default=2000, ge=_FEWEST)
    """How many images of the valid split are asked what int8 costs."""
    max_drop: float = Field(default=0.01, ge=0, le=1)
    """By how much the share of right answers to the valid split may be below the float model's; 0.01 is one point."""
    max_disagreement: float = Field(default=0.01, ge=0, le=1)
    """The share of the valid split that may be answered otherwise than by the float model; one image may be in any case."""
    max_float_share: float = Field(default=0.5, ge=0, le=1)
    """The share of the layers that may return to float."""
    max_tries: int = Field(default=6, ge=0)
    """How many models with layers in float are tried."""
    min_int8_share: float = Field(default=0.5, ge=0, le=1)
    """The share of the multiplications that the runtime has to execute in int8; below it an engine is int8 by name only."""


class Executed(NamedTuple):
    """A layer as the runtime executes it."""

    layer: str
    multiplications: float
    """An image."""
    in_int8: bool


class Quantiser(Protocol[ModelT]):
    """A model of one runtime that can be quantised but for some layers."""

    def in_float(self) -> ModelT:
        """The model before quantisation."""
        ...

    def quantised(self, kept: Sequence[str]) -> ModelT:
        """All in int8 but the layers of these names."""
        ...

    def layers(self, model: ModelT) -> list[str]:
        """Names of the layers that are in int8 in a quantised model."""
        ...

    def without(self, model: ModelT, layer: str) -> ModelT:
        """A quantised model with one layer in float: good enough to rank layers by."""
        ...

    def logits(self, model: ModelT, images: Images) -> Iterator[Logits]:
        """What a model answers, in order; in as many pieces as it likes."""
        ...

    def compute(self, model: ModelT) -> list[Executed]:
        """The layers of the graph that the runtime executes."""
        ...


@dataclass(frozen=True)
class Controlled:
    """A quantised model, and what it costs."""

    model: Any
    facts: Mapping[str, int | float | str]


@dataclass(frozen=True)
class _Trial:
    model: Any
    kept: tuple[str, ...]
    compute: list[Executed]
    logits: Logits
    drop: float
    otherwise: float

    @property
    def int8_share(self) -> float:
        whole = sum(each.multiplications for each in self.compute)
        return sum(each.multiplications for each in self.compute if each.in_int8) / whole if whole else 0.0


def calibration_images(request: ExportRequest, settings: Quantised) -> Images:
    """The first images (n, h, w, c) of the calibration split; raises ExportError where there are too few."""
    images = _first(request.calibration(), settings.max_calibration_images)
    if len(images) < _FEWEST:
        raise ExportError(
            f"{counted(len(images), 'calibration image')}; int8 needs at least {_FEWEST}: raise splitting.calibration_share"
        )
    return images


def _first(batches: Iterator[npt.NDArray[Any]], most: int) -> npt.NDArray[Any]:
    taken: list[npt.NDArray[Any]] = []
    for batch in batches:
        taken.append(batch[: most - sum(map(len, taken))])
        if sum(map(len, taken)) >= most:
            break
    return np.concatenate(taken) if taken else np.empty((0, 0, 0, 0), np.uint8)


def control(quantiser: Quantiser[Any], request: ExportRequest, settings: Quantised, *, runtime: str) -> Controlled:
    """Quantise, and return as few layers to float as the limits on the valid split ask for.

    Layers are ranked once: by how far the answers stay from the float model's when that layer alone is in float. Then the
    worst one returns, the worst two, four, until the limits are met, and the number between is halved in; so many never
    return that less than `min_int8_share` is left. Where no try is inside the limits, the one that comes closest is taken:
    its cost is among the facts, and the gates judge it on test. Raises ExportError without valid images, and where the
    runtime executes less in int8 with no layer returned.
    """
    images, targets = _valid(request, settings.max_valid_images)
    float_logits = _answered(quantiser, quantiser.in_float(), images)
    right = float(request.task.right(float_logits, targets).mean())

    def tried(kept: Sequence[str]) -> _Trial:
        model = quantiser.quantised(kept)
        logits = _answered(quantiser, model, images)
        drop = right - float(request.task.right(logits, targets).mean())
        otherwise = 1 - float(request.task.agree(logits, float_logits).mean())
        return _Trial(model, tuple(kept), quantiser.compute(model), logits, drop, otherwise)

    allowed = max(settings.max_disagreement, 1 / len(images))

    def over(trial: _Trial) -> float:
        """How far outside the limits; not above 0 is inside. Shares of images are never a billionth apart."""
        return max(trial.drop - settings.max_drop, trial.otherwise - allowed) - 1e-9

    best, tries = tried(()), 0
    _refuse_in_name_only(best, settings.min_int8_share, runtime)
    layers = quantiser.layers(best.model)
    if over(best) > 0 and layers:
        ranked = _ranked(quantiser, best, layers, images, float_logits)
        fewest, most = 1, int(settings.max_float_share * len(layers))
        while fewest <= most and tries < settings.max_tries:
            # A try takes seconds, and few layers are mostly enough.
            number = min(max(1, 2 * (fewest - 1)), (fewest + most) // 2)
            trial, tries = tried(ranked[:number]), tries + 1
            if trial.int8_share < settings.min_int8_share:
                most = number - 1
            elif over(trial) <= 0:
                best, most = trial, number - 1
            else:
                best, fewest = min(best, trial, key=over), number + 1
    return Controlled(
        best.model,
        {
            "int8_share": round(best.int8_share, 4),
            "int8_layers": len(layers) - len(best.kept),
            "float_layers": len(best.kept),
            "float_layer_names": ", ".join(best.kept),
            "accuracy_control_tries": tries,
            "valid_images": len(images),
            "valid_drop": round(100 * best.drop, 4),
            "valid_disagreement": round(100 * best.otherwise, 4),
        },
    )


def _valid(request: ExportRequest, most: int) -> tuple[Images, npt.NDArray[Any]]:
    images: list[Images] = []
    targets: list[npt.NDArray[Any]] = []
    for some, expected in request.valid():
        images.append(some)
        targets.append(expected)
        if sum(map(len, images)) >= most:
            break
    if not images:
        raise ExportError("the valid split is empty, and what int8 costs is measured on it: raise splitting.valid_share")
    return np.concatenate(images)[:most], np.concatenate(targets)[:most]


def _answered(quantiser: Quantiser[Any], model: Any, images: Images) -> Logits:
    return np.concatenate(list(quantiser.logits(model, images)))


def _ranked(
    quantiser: Quantiser[Any], quantised: _Trial, layers: Sequence[str], images: Images, float_logits: Logits
) -> list[str]:
    """The layers, the one whose return to float brings the answers nearest to the float model's first."""
    hardest = np.sort(np.argsort(-_apart(quantised.logits, float_logits), kind="stable")[:_TO_RANK])
    remains = {
        layer: float(
            _apart(
                _answered(quantiser, quantiser.without(quantised.model, layer), images[hardest]), float_logits[hardest]
            ).mean()
        )
        for layer in layers
    }
    return sorted(layers, key=lambda layer: (remains[layer], layer))


def _apart(logits: Logits, others: Logits) -> npt.NDArray[np.float64]:
    return np.asarray(((logits.astype(np.float64) - others) ** 2).reshape(len(logits), -1).sum(axis=1))


def _refuse_in_name_only(trial: _Trial, least: float, runtime: str) -> None:
    whole = sum(each.multiplications for each in trial.compute) or 1.0
    largest = sorted((-each.multiplications, each.layer) for each in trial.compute if not each.in_int8)
    named = ", ".join(f"{layer} ({-amount / whole:.0%})" for amount, layer in largest[:5])
    if trial.int8_share < least:
        raise ExportError(
            f"{runtime} executes {trial.int8_share:.0%} of the multiplications in int8, at least {least:.0%} were expected: "
            f"this engine would be int8 by name only. In float stayed {named or 'everything'}; "
            f"lower min_int8_share, or build fp32"
        )
