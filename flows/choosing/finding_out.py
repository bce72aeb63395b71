"""What is found out about variants: each trunk through the stages of a training, its engines on the valid images, and times.

A variant that cannot be trained, made smaller or exported is told with its reason, and the others go on.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from components import optimisation, plugins, variants
from components.answer_tables import answers_of
from components.contracts.data import Splits
from components.contracts.errors import CheckpointMismatch, ConfigError, ExportError, PassFailed, TrainingDiverged
from components.contracts.families import Answers
from components.contracts.models import Engine
from components.contracts.progress import Progress
from components.contracts.records import Stored
from components.contracts.verdicts import Evaluation
from components.contracts.wording import counted
from components.evaluation import evaluate
from components.export import REFERENCE
from components.intervals import paired_difference
from components.segments import limit
from components.training import on_this_machine
from components.variant_rule import in_rule, most_accurate, pick
from components.variants import Choice, Timings, Variant, missed, take_times, timed
from flows import stopping
from flows.choosing.expansion import Expansion, Trunk, expanded
from flows.choosing.winner import expect_free, winner_name
from flows.terminal import Console
from flows.training import keys
from flows.training.chosen import ChosenRecipe
from flows.training.run import STAGES, Run
from flows.training.steps import with_memory
from flows.workspace.data import ensure
from flows.workspace.settings import read_settings

_ITS_OWN = (TrainingDiverged, ConfigError, CheckpointMismatch, PassFailed, ExportError)
"""Errors of a variant's values: the others go on. All else would meet them as well."""


@dataclass(frozen=True)
class Answered:
    """A variant's engine, and what it answered on the valid images."""

    run: Run
    variant: Variant
    engine: Stored[Engine]
    evaluation: Stored[Evaluation]
    answers: Answers


@dataclass
class Comparison:
    """A choice that this process makes."""

    expansion: Expansion
    runs: dict[int, Run]
    """By the number of the trunk."""
    folder: Path
    console: Console
    splits: Stored[Splits] | None = None
    answered: list[Answered] = field(default_factory=list)
    others: list[Variant] = field(default_factory=list)
    """Those without figures."""
    failed: set[int] = field(default_factory=set)

    @property
    def trunks(self) -> Iterator[tuple[Trunk, Run]]:
        """Those that are not given up, each with the run that its stages go through."""
        for trunk in self.expansion.trunks:
            if trunk.number not in self.failed:
                yield trunk, self.runs[trunk.number]

    def begin(self, trunk: Trunk) -> None:
        """Tell whose stages come now."""
        self.console.line(f"network {trunk.number} of {len(self.expansion.trunks)}: {trunk.name}")

    @contextlib.contextmanager
    def trying(self, trunk: Trunk) -> Iterator[None]:
        """What is the fault of a variant ends it, and not the choice."""
        try:
            yield
        except _ITS_OWN as error:
            self.failed.add(trunk.number)
            self.console.line(f"    {trunk.name}: {error}")
            self.others += [trunk.variant(one.name, status="failed", reason=str(error)) for one in trunk.targets]


@contextlib.contextmanager
def opened(recipe: ChosenRecipe, write: str, *, quiet: bool) -> Iterator[Comparison]:
    """A comparison whose variants are checked, whose workspace is held, and whose data are the pinned ones."""
    workspace, config = recipe.workspace, recipe.config
    settings, expansion = read_settings(workspace.state), expanded(recipe)
    # Before data are fetched for trainings that cannot be.
    for trunk in expansion.trunks:
        on_this_machine(trunk.config.training, settings.num_threads, settings.ray_address)
        if trunk.config.optimisation.passes:
            optimisation.on_this_machine(trunk.config.training)
    expect_free(workspace.root, winner_name(config, write), config.name)
    with workspace.locked(f"visionloop choose {recipe.name}"), Console(len(STAGES), quiet=quiet) as console:
        limit(workspace.cache, settings.cache_bytes)
        data = ensure(workspace, config.source, config.source_settings)
        folder = workspace.choices / config.name
        runs = {
            trunk.number: Run(workspace, trunk.config, data, settings, console, folder=folder / trunk.folder)
            for trunk in expansion.trunks
        }
        console.line(
            f"choice of recipe {config.name}: {counted(expansion.size, 'variant')}, "
            f"{counted(len(expansion.trunks), 'network')} of them, data version {data.dvc_hash[:12]}"
        )
        for variant in expansion.left_out:
            console.line(f"    {variant.name}: {variant.status}: {variant.reason}")
        comparison = Comparison(expansion, runs, folder, console, others=list(expansion.left_out))
        with stopping.at_once(console.stopped):
            yield comparison
        _remove_others(folder, [trunk.folder for trunk in expansion.trunks])


def _remove_others(folder: Path, kept: Sequence[str]) -> None:
    """The links of variants that the recipe no longer names hold nothing any more."""
    for path in folder.iterdir():
        if path.is_dir() and path.name not in kept:
            shutil.rmtree(path)


def answer(comparison: Comparison, trunk: Trunk, splits: Stored[Splits], engines: Sequence[Stored[Engine]]) -> None:
    """Ask the engines of a trunk about the valid images: the torch reference too, where the recipe limits the drop to it."""
    run, limits = comparison.runs[trunk.number], comparison.expansion.limits
    comparison.splits = comparison.splits or splits
    if splits.record.digest() != comparison.splits.record.digest():
        raise ConfigError(
            "its images are split otherwise than those of the variants before, so that nothing can be compared"
        )
    reference: Answers | None = None
    for engine in engines:
        name = engine.record.name
        if name == REFERENCE and (limits is None or limits.drop is None):
            continue
        evaluation = _on_valid(run, engine, splits)
        record, answers = evaluation.record, answers_of(evaluation, engine.record.classes, run.task)
        if name == REFERENCE:
            reference = answers
        elif record.status != "evaluated" or record.reason or answers is None:
            facts = {"engine_digest": engine.record.digest(), "size_bytes": engine.record.size_bytes}
            comparison.others.append(trunk.variant(name, status="not executed here", reason=record.reason, **facts))
        else:
            worst = min(record.per_class, key=lambda one: (one.recall.value, one.name), default=None)
            variant = trunk.variant(
                name,
                status="measured",
                engine_digest=engine.record.digest(),
                headline=record.metrics[run.task.headline],
                worst_class=worst.name if worst else "",
                worst_recall=worst.recall if worst else None,
                drop=paired_difference(reference.right, answers.right) if reference else None,
                size_bytes=engine.record.size_bytes,
            )
            comparison.answered.append(Answered(run, variant, engine, evaluation, answers))
    absent = [target.name for target in trunk.targets if target.name in run.absent]
    comparison.others += [trunk.variant(name, status="failed", reason=run.absent[name]) for name in absent]


@task(name="valid images", cache_policy=NO_CACHE)
def _on_valid(run: Run, engine: Stored[Engine], splits: Stored[Splits]) -> Stored[Evaluation]:
    def compute(out: Path, progress: Progress) -> Evaluation:
        config, data = run.config.evaluation, run.workspace.data
        return evaluate(engine, splits, data, run.task, config, out=out, split="valid", progress=progress)

    inputs = {**keys.evaluation_inputs(run, engine, splits), "valid": splits.record.digest()}
    return run.stage("evaluation", Evaluation, compute, inputs=inputs, instance=f"{engine.record.name}-valid")


@task(name="times", cache_policy=NO_CACHE)
def take(comparison: Comparison, *, anew: bool = False) -> Stored[Timings]:
    """The times of all engines that answered, taken in turns; raises ConfigError where there is none."""
    answered, splits = comparison.answered, comparison.splits
    if not answered or splits is None:
        reasons = "; ".join(dict.fromkeys(f"{one.name}: {one.reason}" for one in comparison.others))
        raise ConfigError(f"no variant of recipe {comparison.expansion.recipe.name!r} could be executed here: {reasons}")
    run, engines = answered[0].run, [one.engine for one in answered]

    def compute(_: Path, progress: Progress) -> Timings:
        taken = take_times(engines, splits, run.workspace.data, run.config.evaluation, progress=progress)
        found = [with_memory(one.run, one.engine, record) for one, record in zip(answered, taken.measurements, strict=True)]
        return taken.model_copy(update={"measurements": tuple(found)})

    inputs = {
        "valid": splits.record.digest(),
        "source": plugins.source_digest(Path(variants.__file__)),
        **{
            f"{place}.{key}": value
            for place, one in enumerate(answered)
            for key, value in keys.measurement_inputs(one.run, one.engine).items()
        },
    }
    return run.stage("evaluation", Timings, compute, inputs=inputs, instance="times", anew=anew)


def judged(comparison: Comparison, timings: Stored[Timings]) -> Choice:
    """All variants with their figures, and the one that the recipe's limits and its rule take."""
    expansion, recipe = comparison.expansion, comparison.expansion.recipe.config
    found: list[Variant] = []
    rights = {}
    for one, measured, rates in zip(
        comparison.answered, timings.record.measurements, timings.record.batch_rates, strict=True
    ):
        variant = timed(one.variant, measured, rates, recipe.export.hourly_price)
        gates, engine = recipe.gating, one.engine.record
        reasons = missed(variant, engine, one.evaluation, measured, gates, expansion.limits, one.run.task)
        found.append(variant.model_copy(update={"missed": tuple(reasons)}))
        rights[variant.name] = one.answers.right
    best = most_accurate(found)
    assert best is not None
    found = [one.model_copy(update={"difference": paired_difference(rights[one.name], rights[best.name])}) for one in found]
    everything = [*found, *comparison.others]
    picked, run = pick(everything, expansion.config), comparison.answered[0].run
    assert comparison.splits is not None
    return Choice(
        recipe=recipe.name,
        model=recipe.model,
        data_version=run.data.dvc_hash,
        splits_digest=comparison.splits.record.digest(),
        config=expansion.config,
        headline=run.task.headline,
        num_valid=comparison.splits.record.counts["valid"],
        num_threads=recipe.evaluation.num_threads,
        hourly_price=recipe.export.hourly_price,
        machine=timings.record.machine,
        rule=in_rule(expansion.config),
        chosen=picked.chosen,
        nearest=picked.nearest,
        variants=tuple(one.model_copy(update={"told": picked.told[one.name]}) for one in everything),
    )
