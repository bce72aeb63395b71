"""What `visionloop train` would do, found out without doing it: nothing is written, locked, fetched or started."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from components import data_folder, dataversions, dvc_repository, optimisation
from components.clusters import Clusters
from components.companions import TEST_LEDGER
from components.contracts.data import Dataset, Splits
from components.contracts.models import Checkpoint, Engine
from components.contracts.records import RecordT, Stored
from components.contracts.releases import Release
from components.contracts.verdicts import Evaluation, Measurement, Robustness, SliceTable, Verdict, exceptable
from components.contracts.wording import counted
from components.estimates import Images, PhaseEstimate, estimate
from components.export import Graph, TargetConfig
from components.packaging import expect_critical, expect_provable
from components.samples import rows
from components.splitting import TestLedger, split
from components.store import read_manifest
from components.training import CHAMPION, expect_enough, on_this_machine
from flows.terminal import Console, Say, silent
from flows.training import keys
from flows.training.chosen import ChosenRecipe
from flows.training.facts import facts_of_test
from flows.training.given_models import expect_to_teach
from flows.training.given_models import teacher as given_teacher
from flows.training.run import STAGES, Run, stage_folder, stage_number
from flows.training.serving_check import ServingCheck
from flows.workspace.settings import read_settings

State = Literal["stored", "computed", "left out"]


@dataclass(frozen=True)
class PlannedStage:
    """What would become of a stage, or of one of its results."""

    stage: str
    instance: str
    """Which of its results, where it has several."""
    state: State
    unless: str = ""
    """What could make it otherwise."""


@dataclass(frozen=True)
class Plan:
    """What a run would do."""

    run: str
    recipe: str
    data_version: str
    num_files: int
    stages: tuple[PlannedStage, ...]
    phases: tuple[PhaseEstimate, ...]
    """Of the training, where it would be computed and its classes are known."""
    split: bool
    """Whether it is known which images train; else their numbers are estimated from the pinned number of files."""
    notes: tuple[str, ...]

    @property
    def training_s(self) -> float | None:
        """About so many seconds of training; None where it is not known, or nothing trains."""
        seconds = [phase.seconds for phase in self.phases]
        return None if not seconds or None in seconds else sum(each for each in seconds if each is not None)

    def to_json(self) -> dict[str, Any]:
        phases = [
            {**asdict(phase), "rows_seconds": phase.rows_s, "fit_seconds": phase.fit_s, "seconds": phase.seconds}
            for phase in self.phases
        ]
        return {**asdict(self), "phases": phases, "training_seconds": self.training_s}


def dry_run(chosen: ChosenRecipe, *, measure_again: bool = False, say: Say = silent) -> Plan:
    """Read recipe and pinned data as a run would, with the same errors, and say what it would do. Raises VisionloopError.

    `say` is told what takes long.
    """
    workspace, config = chosen.workspace, chosen.config
    settings = read_settings(workspace.state)
    on_this_machine(config.training, settings.num_threads, settings.ray_address)
    if config.optimisation.passes:
        optimisation.on_this_machine(config.training)
    notes = []
    there = workspace.data.exists() or config.source is None
    with dvc_repository.leaving_no_trace():
        say("comparing data/ with what is pinned ...")
        data = dataversions.verify(workspace.root) if there else dataversions.pinned(workspace.root)
        if not there:
            notes.append(f"data/ is not there: the run fills it from the source {config.source!r} first")
        run = Run(workspace, config, data, settings, Console(len(STAGES), quiet=True))
        notes += [f"training on {run.compute.told}"] if run.compute.told else []
        notes += [f"{name}: {why}" for name, why in run.absent.items()]
        notes += _of_teacher(run)
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            stages, splits = _stages(run, scratch, measure_again)
            trains = any(each.stage == "training" and each.state == "computed" for each in stages)
            images = _images(run, splits) if there else None
            if splits is not None:
                expect_provable(config.packaging, splits.record, run.task)
                expect_enough(config.training, splits.record.counts["train"])
            elif images is not None:
                expect_critical(config.packaging, images.classes, run.task)
            phases: Sequence[PhaseEstimate] = ()
            if trains and images is not None and images.classes:
                (scratch / "cache").mkdir()
                say("timing a few images and training steps on this machine, which can take minutes where it is busy ...")
                phases = estimate(
                    config.training,
                    images,
                    cache=workspace.cache,
                    root=workspace.root,
                    num_threads=settings.num_threads,
                    scratch=scratch / "cache",
                )
            if trains and splits is not None and run.store.begun("training", keys.training_key(run, splits)):
                notes.append("training: a run that was stopped left work, which is taken up, so it takes less time")
    if config.optimisation.passes and config.optimisation.compare:
        notes.append("optimisation: the network as it was trained is exported, asked and timed too, which is not looked at")
    if config.evaluation.folds:
        notes.append(f"folds: {config.evaluation.folds} more trainings, evaluated on all images in turns, are not looked at")
    return Plan(
        run.id, config.name, data.dvc_hash, data.num_files, tuple(stages), tuple(phases), splits is not None, tuple(notes)
    )


def _of_teacher(run: Run) -> list[str]:
    """Gives the run its teacher, where no registry has to be asked; returns what is to be said of it."""
    config = run.config.training.teacher
    if config is None:
        return []
    if config.checkpoint:
        run.teacher = given_teacher(config, run.data, run=run.folder, root=run.workspace.root, cache=run.workspace.cache)
        if run.workspace.data.exists():
            classes = run.task.classes(list(data_folder.listing(run.workspace.data).classes))
            expect_to_teach(run.teacher, classes, run.config.training.task)
    told = run.taught_by or f"the champion of {config.champion}, which is looked up by the run"
    return [f"teacher: {told}. It is asked about each train image in each view once, and that time is not in the estimate"]


class _Walk:
    """Looks at one stage after the other, as a run would."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.stages: list[PlannedStage] = []
        self.unless = ""
        """Of the stages whose inputs are not known, since one before them is not in the store."""

    def look(
        self,
        stage: str,
        record: type[RecordT],
        inputs: Mapping[str, str] | None,
        *,
        instance: str = "",
        worth: Callable[[RecordT], bool] = lambda _: True,
    ) -> Stored[RecordT] | None:
        """The stage's result, where the store has it and it is worth keeping; `inputs` are None where they are not known."""
        stored = self.run.stored(stage, record, inputs=inputs, instance=instance) if inputs is not None else None
        found = stored if stored is not None and worth(stored.record) else None
        self.see(stage, "computed" if found is None else "stored", instance, self.unless if inputs is None else "")
        if found is None:
            self.unless = self.unless or f"{stage} gives what it gave before"
        return found

    def see(self, stage: str, state: State, instance: str = "", unless: str = "") -> None:
        self.stages.append(PlannedStage(stage, instance, state, unless))


def _stages(run: Run, scratch: Path, measure_again: bool) -> tuple[list[PlannedStage], Stored[Splits] | None]:
    """What would become of each stage; the splits, where they can be known."""
    walk = _Walk(run)
    dataset = walk.look("validation", Dataset, keys.validation_inputs(run))
    splits = walk.look("splitting", Splits, keys.splitting_inputs(run, dataset) if dataset else None)
    if dataset and not splits:
        # It takes a moment and is the same each time, so what it gives is known.
        out = scratch / "splitting"
        out.mkdir()
        ledger = TestLedger.read(run.workspace.root / TEST_LEDGER)
        clusters = Clusters.read(run.workspace.root)
        splits = Stored(split(dataset, ledger, run.config.splitting, run.task, clusters=clusters, out=out), out)
        walk.unless = ""
    warm = run.config.training.weights == CHAMPION
    if warm:
        walk.unless = walk.unless or "it went on from today's champion before"
    taught = run.config.training.teacher is not None and run.teacher is None
    if taught:
        walk.unless = walk.unless or "today's champion taught it before"
    known = splits if not warm and not taught else None
    checkpoint = walk.look("training", Checkpoint, keys.training_inputs(run, known) if known else None)
    if run.config.optimisation.passes:
        inputs = keys.optimisation_inputs(run, checkpoint, splits) if checkpoint and splits else None
        checkpoint = walk.look("optimisation", Checkpoint, inputs)
    graph_inputs = keys.graph_inputs(run, checkpoint) if checkpoint else None
    graph = walk.look("export", Graph, graph_inputs, instance="graph")
    engines = []
    for target in run.targets:
        inputs = keys.engine_inputs(run, checkpoint, graph, splits, target) if checkpoint and graph and splits else None
        engines.append(walk.look("export", Engine, inputs, instance=target.name))
    named = list(zip(run.targets, engines, strict=True))
    evaluations = [
        walk.look(
            "evaluation",
            Evaluation,
            keys.evaluation_inputs(run, engine, splits, beyond_test=keys.asked_beyond_test(engine))
            if engine and splits
            else None,
            instance=target.name,
        )
        for target, engine in named
    ]
    sliced = None
    if dataset and splits and evaluations[0] and evaluations[0].record.predictions:
        facts = facts_of_test(run, dataset, evaluations[0])
        sliced = walk.look("evaluation", SliceTable, keys.slices_inputs(run, facts, evaluations[0]), instance="slices")
    else:
        walk.look("evaluation", SliceTable, None, instance="slices")
    corrupted = _corrupted(walk, splits, named, evaluations)
    measurements = [
        walk.look(
            "evaluation",
            Measurement,
            keys.measurement_inputs(run, engine) if engine else None,
            instance=keys.latency_of(target.name),
            worth=lambda record: not measure_again and not keys.worth_measuring_again(record),
        )
        for target, engine in named
    ]
    champion = "the champion is another by now"
    verdict = _verdict(run, engines, evaluations, measurements, sliced, corrupted)
    walk.see("gating", "stored" if verdict else "computed", unless=champion if verdict else walk.unless)
    served = verdict.record.serving_engine if verdict else run.config.export.serving
    refused = verdict is not None and verdict.record.status != "pass" and not exceptable(verdict.record)
    packaged = [*(_unserved(verdict) if verdict else ()), *([] if refused else [served])]
    for name in packaged:
        serving = next((engine for target, engine in named if target.name == name), None)
        packaging = keys.packaging_inputs(run, serving, splits) if serving and splits else None
        release = walk.look("packaging", Release, packaging)
        checking = keys.serving_check_inputs(run, release) if release else None
        walk.look("serving_check", ServingCheck, checking, worth=lambda record: not record.timed_out)
    if not packaged:
        for stage in ("packaging", "serving_check"):
            walk.see(stage, "left out", unless=champion)
    walk.see("evidence", "stored" if _drawn(run, verdict) else "computed", unless=champion if verdict else walk.unless)
    recorded = verdict is not None and (run.folder / stage_folder("registration") / "outcome.json").is_file()
    walk.see("registration", "stored" if recorded else "computed", unless=champion if recorded else walk.unless)
    return walk.stages, splits


def _corrupted(
    walk: _Walk,
    splits: Stored[Splits] | None,
    named: Sequence[tuple[TargetConfig, Stored[Engine] | None]],
    evaluations: Sequence[Stored[Evaluation] | None],
) -> list[Stored[Robustness] | None]:
    """What is known of each engine that would be shown corrupted images; which ones these are is told by the evaluations."""
    run = walk.run
    known = [(e, v) for (_, e), v in zip(named, evaluations, strict=True) if e is not None and v is not None]
    if splits is not None and len(known) == len(named):
        asked = keys.asked_corrupted(run, [e for e, _ in known], [v for _, v in known])
        return [
            walk.look(
                "evaluation",
                Robustness,
                keys.corrupted_inputs(run, engine, splits),
                instance=keys.corrupted_of(engine.record.name),
            )
            for engine in asked
        ]
    if run.config.evaluation.robustness_images:
        walk.look("evaluation", Robustness, None, instance="corrupted images")
    return []


def _verdict(
    run: Run,
    engines: Sequence[Stored[Engine] | None],
    evaluations: Sequence[Stored[Evaluation] | None],
    measurements: Sequence[Stored[Measurement] | None],
    sliced: Stored[SliceTable] | None,
    corrupted: Sequence[Stored[Robustness] | None],
) -> Stored[Verdict] | None:
    """What an earlier start of this run judged of the same engines; whom they were compared with is not looked up."""
    link = run.folder / stage_folder("gating")
    judged = [*zip(engines, evaluations, measurements, strict=True)]
    known = [(e, v, m) for e, v, m in judged if e is not None and v is not None and m is not None]
    shown = [stored for stored in corrupted if stored is not None]
    if len(known) < len(judged) or len(shown) < len(corrupted) or not link.exists():
        return None
    folder = link.resolve()
    verdict = run.store.open("gating", folder.name, Verdict)
    measured = [m for _, _, m in known]
    inputs = keys.gating_inputs(
        run, [e for e, _, _ in known], [v for _, v, _ in known], measured, None, sliced, corrupted=shown
    )
    before = dict(read_manifest(folder)["inputs"])
    not_looked_up = {"champion": "", "champion.corrupted": "", "renamed": "", keys.UNSERVED: ""}
    return verdict if {**before, **not_looked_up} == {**inputs, **not_looked_up} else None


def _unserved(verdict: Stored[Verdict]) -> tuple[str, ...]:
    """The engines that were chosen first and did not serve."""
    return tuple(json.loads(read_manifest(verdict.folder)["inputs"].get(keys.UNSERVED, "{}")))


def _drawn(run: Run, verdict: Stored[Verdict] | None) -> bool:
    """Whether an earlier start of this run, judged as it would be now, drew the evidence."""
    return verdict is not None and (run.folder / stage_folder("evidence")).exists()


def _images(run: Run, splits: Stored[Splits] | None) -> Images:
    """The images that a training would take; before they are validated and split, as many of them as can be expected."""
    if splits is not None:
        train, valid = (
            [(run.workspace.data / path, picture) for path, picture in zip(table["path"], table["picture"], strict=True)]
            for table in (rows(splits, "train"), rows(splits, "valid"))
        )
        return Images(splits.record.classes, train, valid, len(train), len(valid), split=True)
    listed = data_folder.listing(run.workspace.data).classes
    config, ledger = run.config.splitting, TestLedger.read(run.workspace.root / TEST_LEDGER)
    # A person may have chosen more test pictures, or fewer, than the share that is drawn.
    test_share = sum(ledger.members.values()) / len(ledger.members) if ledger.members else ledger.test_share
    rest = run.data.num_files * (1 - test_share)
    num_train = round(rest * (1 - config.valid_share - config.calibration_share))
    some = [(path, "") for paths in listed.values() for path in paths]
    return Images(tuple(listed), some, (), num_train, round(rest * config.valid_share), split=False)


def told(plan: Plan) -> list[str]:
    """The plan for a person."""
    lines = [
        f"Dry run of {plan.run}: recipe {plan.recipe}, {counted(plan.num_files, 'file')} of data version "
        f"{plan.data_version[:12]}. Nothing is run, fetched or written."
    ]
    lines += [f"    {note}" for note in plan.notes]
    alike = itertools.groupby(plan.stages, key=lambda each: (each.stage, each.state, each.unless))
    for (stage, state, unless), group in alike:
        names = ", ".join(each.instance for each in group if each.instance)
        line = f"[{stage_number(stage)}/{len(STAGES)}] {stage}{f' ({names})' if names else ''}: {_STATES[state]}"
        if stage == "registration" and state == "stored":
            line = line.replace(_STATES[state], "recorded already")
        lines.append(line + (f", unless {unless}" if unless else ""))
        if stage == "training" and state == "computed":
            lines += _training_told(plan)
    return lines


_STATES: dict[str, str] = {
    "stored": "from the store",
    "computed": "computed",
    "left out": "left out: what did not pass is not packaged",
}


def _training_told(plan: Plan) -> list[str]:
    if not plan.phases:
        return ["    what it trains on, and how long, is not known before the data are there"]
    lines = []
    about = "" if plan.split else "about "
    if not plan.split:
        lines.append(
            "    which images train is known when they are validated and split; their numbers are estimated from the "
            "pinned number of files"
        )
    for phase in plan.phases:
        views = f" in {phase.views} views" if phase.views > 1 else ""
        lines.append(
            f"    phase {phase.number}, {phase.part}: {about}{counted(phase.num_train, 'train image')}{views}, "
            f"{about}{phase.num_valid} valid"
            + (
                f"; at most {counted(phase.epochs, 'epoch')} of {counted(phase.num_steps, 'step')}, "
                f"{counted(phase.batch_size, 'image')} each"
                if phase.epochs
                else ""
            )
        )
        if phase.num_cached is None:
            lines.append(f"        {phase.kind}: {about}{phase.num_rows}; how many are cached is not known: {phase.unknown}")
        else:
            lines.append(f"        {phase.kind}: {phase.num_cached} of {phase.num_rows} are cached")
        lines.append(f"        {_time_told(phase)}")
    total = plan.training_s
    lines.append(
        "    in all: not known"
        if total is None
        else f"    in all {_about(total)} on this machine as busy as it is now; phases may stop early"
    )
    return lines


def _time_told(phase: PhaseEstimate) -> str:
    parts = []
    if phase.rows_s is None:
        parts.append(f"{phase.kind}: not known, since none could be computed")
    elif phase.num_rows_timed:
        parts.append(
            f"{_about(phase.rows_s)} for {phase.kind} ({_ms(phase.row_s)} each, timed on "
            f"{counted(phase.num_rows_timed, 'image')})"
        )
    if not phase.epochs:
        parts.append("computed in seconds")
    elif phase.fit_s is None:
        parts.append("steps: not known, since they could not be timed")
    else:
        parts.append(
            f"{_about(phase.fit_s)} for the epochs ({_ms(phase.step_s)} a step, timed on "
            f"{counted(phase.num_steps_timed, 'step')} on random numbers)"
        )
    return "; ".join(parts)


def _ms(seconds: float | None) -> str:
    return f"{(seconds or 0.0) * 1000:.2g} ms" if (seconds or 0.0) < 0.1 else f"{seconds or 0.0:.2g} s"


def _about(seconds: float) -> str:
    if seconds < 1:
        return "less than a second"
    if seconds < 100:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"
