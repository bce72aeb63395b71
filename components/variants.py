"""Variants of a recipe, and what is found out about them: on valid images and by times of one machine, never on test.

A variant is a backbone, passes and a target with its precision. The recipe's gates and limits are held against values and
not against intervals, since one has to be taken: what is taken is judged by the same gates afterwards, on the test images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, JsonValue, field_validator, model_validator

from components import plugins
from components.answer_tables import answers_of
from components.choosing import Limits, Offer, price_of_a_million
from components.contracts.data import Splits
from components.contracts.families import Evidence, Gate, Task
from components.contracts.models import Engine
from components.contracts.progress import Progress, silent
from components.contracts.records import Record, Stored, canonical_json
from components.contracts.verdicts import ClassMetrics, Estimate, Evaluation, Finding, Measurement
from components.contracts.wording import counted
from components.evaluation import EvaluationConfig, measure
from components.export import REFERENCE, TargetConfig
from components.gating import GatingConfig
from components.images import batches
from components.machine import fingerprint
from components.optimisation import ChosenPass
from components.samples import rows
from components.speed import BATCH, ROUNDS, batch_rates, rate_of

MOST = 32
"""Variants of one choice: all engines lie in memory at once, so that their times are taken in turns."""
Objective = Literal["fastest", "cheapest", "smallest", "most_accurate"]


class BackboneChoice(Record):
    """A network that may be trained, and what is trained otherwise with it."""

    backbone: str
    settings: dict[str, Any] = {}
    weights: str | None = Field(default=None, description="As training.weights, whose value it has by default.")
    values: dict[str, JsonValue] = Field(
        default={},
        description="Other values of the section training with this network, such as {training.fit.learning_rate: 0.001}.",
    )

    @field_validator("values")
    @classmethod
    def _of_training(cls, values: dict[str, JsonValue]) -> dict[str, JsonValue]:
        own = ("training.backbone", "training.backbone_settings", "training.weights")
        for key in values:
            if not key.startswith("training."):
                raise ValueError(f"{key} is no key of training; begin it with training., such as training.fit.learning_rate")
            if key.startswith(own) or key.startswith("training.task"):
                raise ValueError(f"{key} is no value that goes with a network; say backbone, settings and weights beside it")
        return values


class ChoiceConfig(Record):
    """Variants that `visionloop choose` compares, every combination of what is listed, and the rule that takes one."""

    backbones: tuple[BackboneChoice, ...] = Field(default=(), description="None for the recipe's own network alone.")
    passes: tuple[tuple[ChosenPass, ...], ...] = Field(
        default=(), description="Lists of passes, such as [[], [{pass: prune}]]; none for the recipe's own passes alone."
    )
    targets: tuple[TargetConfig, ...] = Field(default=(), description="None for those of export.targets.")
    objective: Objective = Field(
        default="fastest",
        description="What the taken variant is, of those that meet every limit and are about as accurate as the best of "
        "them: fastest (one image), cheapest (batches), smallest (files), or most_accurate.",
    )
    within: float = Field(
        default=0.01, ge=0, lt=1, description="How far below the most accurate one it may lie: 0.01 is one point."
    )

    @model_validator(mode="after")
    def _differ(self) -> Self:
        names = [target.name for target in self.targets]
        if REFERENCE in names:
            raise ValueError(f"targets: {REFERENCE} is the yardstick and never served; name other engines")
        for key, entries in (
            ("backbones", [canonical_json(one.to_json()) for one in self.backbones]),
            ("passes", [canonical_json([each.to_json() for each in one]) for one in self.passes]),
            ("targets", names),
        ):
            twice = next((entry for entry in entries if entries.count(entry) > 1), None)
            if twice is not None:
                what = f": {twice}" if key == "targets" else f": entries {entries.index(twice)} and another one are the same"
                raise ValueError(f"{key} names the same twice{what}; leave one out")
        return self


class Chosen(Record):
    """The choice that a recipe comes from."""

    recipe: str
    variant: str
    variants: int = Field(ge=1)
    """How many were measured."""
    choice_digest: str

    @property
    def told(self) -> str:
        """In words, for whoever reads of a model."""
        return (
            f"Values of the recipe: variant {self.variant}, chosen of {counted(self.variants, 'variant')} of recipe "
            f"{self.recipe}, by the valid split and by times of one machine; digest of the choice {self.choice_digest[:16]}"
        )


class Timings(Record):
    """Times of several engines, taken in turns on one machine."""

    machine: str
    measurements: tuple[Measurement, ...]
    batch_rates: tuple[tuple[float, ...], ...]
    """Images a second in batches, by engine and round."""


def take_times(
    engines: Sequence[Stored[Engine]],
    splits: Stored[Splits],
    data: Path,
    config: EvaluationConfig,
    *,
    progress: Progress = silent,
) -> Timings:
    """Time valid images through engines that run here: one at a time, then in batches, always in turns."""
    measured = measure(engines, splits, data, config, split="valid", progress=progress)
    paths = [data / path for path in rows(splits, "valid")["path"].head(BATCH)]
    inputs = [np.concatenate(list(batches(paths, e.record.preprocessing, batch_size=BATCH))) for e in engines]
    runs = -(-config.latency_runs // ROUNDS)
    rates = batch_rates(engines, inputs, num_threads=config.num_threads, runs=runs, progress=progress)
    return Timings(machine=fingerprint(), measurements=tuple(measured), batch_rates=tuple(rates))


class Variant(Record):
    """One variant, and what was found out about it."""

    name: str
    backbone: str
    passes: str
    engine: str
    status: Literal["measured", "not executed here", "failed", "impossible"]
    reason: str = ""
    """Why there are no figures."""
    engine_digest: str = ""
    headline: Estimate | None = None
    """The task's headline metric on the valid images."""
    worst_class: str = ""
    worst_recall: Estimate | None = None
    difference: Estimate | None = None
    """To the most accurate of those that meet every limit, or of all where none does, image by image."""
    drop: Estimate | None = None
    """How much lower it lies than its own network in torch, where the recipe limits that."""
    p50_ms: float | None = None
    p99_ms: float | None = None
    rounds_p50_ms: tuple[float, ...] = ()
    images_a_second: Estimate | None = None
    """In batches."""
    rounds_images_a_second: tuple[float, ...] = ()
    core_hours: float | None = None
    """Of a million answers, in batches."""
    cost: float | None = None
    """The same where the recipe says what an hour of the machine costs."""
    size_bytes: int = 0
    memory_mb: float | None = None
    missed: tuple[str, ...] = ()
    """Limits that it does not meet, in words."""
    told: str = ""
    """What the rule says of it."""

    @property
    def share(self) -> float:
        """The headline metric's value, of one that was measured."""
        assert self.headline is not None
        return self.headline.value

    @property
    def latency_ms(self) -> float:
        """The median of one image, of one that was measured."""
        assert self.p50_ms is not None
        return self.p50_ms

    @property
    def rate(self) -> float:
        """Images a second in batches, of one that was measured."""
        assert self.images_a_second is not None
        return self.images_a_second.value


class Choice(Record):
    """Variants of a recipe, and the one that was taken."""

    recipe: str
    model: str
    data_version: str
    splits_digest: str
    config: ChoiceConfig
    headline: str
    num_valid: int
    num_threads: int
    hourly_price: float | None
    machine: str
    """That took the times."""
    rule: str
    chosen: str
    """Name of the variant; empty where none meets the limits."""
    nearest: str
    """Where none does, the one that misses fewest."""
    variants: tuple[Variant, ...]

    @property
    def measured(self) -> list[Variant]:
        return [variant for variant in self.variants if variant.status == "measured"]

    def of(self, name: str) -> Variant | None:
        return next((variant for variant in self.variants if variant.name == name), None)


def core_hours_of_a_million(images_a_second: float, num_threads: int) -> float:
    """Hours of one core that a million answers take."""
    return 1e6 / images_a_second / 3600 * num_threads


def timed(variant: Variant, measured: Measurement, rounds: Sequence[float], hourly_price: float | None) -> Variant:
    """A variant with its times, and what a million answers cost by them."""
    rate = rate_of(rounds)
    return variant.model_copy(
        update={
            "p50_ms": measured.latency_p50_ms,
            "p99_ms": measured.latency_p99_ms,
            "rounds_p50_ms": measured.rounds_p50_ms,
            "images_a_second": rate,
            "rounds_images_a_second": tuple(rounds),
            "core_hours": core_hours_of_a_million(rate.value, measured.num_threads),
            "cost": None if hourly_price is None else price_of_a_million(1000 / rate.value, hourly_price),
            "memory_mb": measured.memory_mb,
        }
    )


def missed(
    variant: Variant,
    engine: Engine,
    evaluation: Stored[Evaluation],
    measured: Measurement,
    gating: GatingConfig,
    limits: Limits | None,
    task: Task,
) -> list[str]:
    """The gates and limits that a variant does not meet by its values on valid, in words.

    Gates that compare with other engines, or with what is only known of test images, have nothing to say yet.
    """
    evidence = Evidence(
        engine=engine,
        evaluation=_without_intervals(evaluation.record),
        measurement=measured.model_copy(update={"latency_p99": _point(measured.latency_p99)}),
        answers=answers_of(evaluation, engine.classes, task),
        reference=None,
        champion=None,
        champion_known=False,
        headline=task.headline,
    )
    found = []
    for chosen in gating.gates:
        if not chosen.engines or engine.name in chosen.engines:
            gate: Gate = plugins.load("gates", chosen.gate, chosen.settings)
            finding = gate.judge(evidence)
            if finding.status == "fail":
                found.append(_in_words(finding, variant, task.headline))
    if limits is not None:
        offer = Offer(
            variant.name,
            True,
            p99_ms=variant.p99_ms,
            size_mb=engine.size_bytes / 1e6,
            memory_mb=variant.memory_mb,
            drop=variant.drop,
        )
        found += offer.missed(limits)
    return found


def _in_words(finding: Finding, variant: Variant, headline: str) -> str:
    if finding.gate == "accuracy" and variant.headline is not None:
        told = f"not accurate enough: {headline.replace('_', ' ')} {_percent(variant.headline)}"
        return f"{told}, floor {finding.threshold:.4g}"
    if finding.gate == "class_recall" and variant.worst_recall is not None:
        told = f"too weak in class {variant.worst_class!r}: recall {_percent(variant.worst_recall)}"
        return f"{told}, floor {finding.threshold:.4g}"
    if finding.gate == "latency" and finding.value is not None:
        return f"too slow: p99 {finding.value:.3g} ms, limit {finding.threshold:g} ms"
    return f"gate {finding.gate}: {finding.message}"


def _percent(share: Estimate) -> str:
    return f"{share.value:.4f} [{share.low:.4f}, {share.high:.4f}]"


def _point(estimate: Estimate | None) -> Estimate | None:
    """As if as many images as one likes had given the value."""
    return None if estimate is None else estimate.model_copy(update={"low": estimate.value, "high": estimate.value})


def _without_intervals(evaluation: Evaluation) -> Evaluation:
    def of_class(one: ClassMetrics) -> ClassMetrics:
        return one.model_copy(update={name: _point(getattr(one, name)) for name in ("precision", "recall", "f1")})

    return evaluation.model_copy(
        update={
            "metrics": {name: _point(estimate) for name, estimate in evaluation.metrics.items()},
            "per_class": tuple(of_class(one) for one in evaluation.per_class),
        }
    )
