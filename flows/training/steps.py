"""The stages as Prefect tasks: what each one's result depends on, and how often it is tried again. No logic.

Retries are for faults of the world (MLflow away for a moment). A verdict is a value, and a wrong recipe or bad data does not
get better by trying again. Prefect's result cache is off: the store's verified manifests are the only cache.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, wait

from components import attributes, data_folder, dataversions
from components.clusters import Clusters
from components.companions import TEST_LEDGER
from components.contracts.data import Dataset, Renames, Splits, names_after
from components.contracts.errors import ExportError
from components.contracts.evidence import CandidateEvidence, PassesCost
from components.contracts.models import Checkpoint, Engine
from components.contracts.progress import Progress
from components.contracts.records import Stored
from components.contracts.releases import Release
from components.contracts.verdicts import (
    Candidate,
    Evaluation,
    Finding,
    Measurement,
    Outcome,
    Rejection,
    Robustness,
    SliceTable,
    Verdict,
)
from components.evaluation import PREDICTIONS, evaluate, measure
from components.evidence import Compared, collect
from components.export import REFERENCE, Graph, TargetConfig, export, export_graph, memory_mb
from components.gating import Champion, Judged, judge
from components.hooks import LEFTOVERS
from components.optimisation import optimise
from components.packaging import expect_provable, package
from components.pass_costs import compare
from components.robustness import answer_corrupted
from components.slices import make_slices
from components.splitting import TestLedger, split
from components.store import write_atomically
from components.tables import read_frame
from components.training import CHAMPION, train
from components.validation import validate
from flows.orchestrator.notifications import Event, notify
from flows.orchestrator.retries import REGISTRY_POLICY
from flows.training import keys
from flows.training.facts import facts_of_test
from flows.training.given_models import expect_to_teach, keep
from flows.training.given_models import teacher as learned_from
from flows.training.given_models import warm_start as begun_from
from flows.training.results import Results, candidate_digest, shown_of
from flows.training.run import Run
from flows.training.serving_check import ServingCheck, check
from flows.workspace.checking import encoder_of
from flows.workspace.desk import artifacts_of, registry_of
from registry.models import CurrentChampion
from registry.tracking import LiveMetrics


def given_models(run: Run) -> None:
    """Before any work: the champion that the training goes on from and the teacher, where the recipe names them."""
    if run.config.training.weights == CHAMPION:
        warm_start(run)
    if run.config.training.teacher is not None:
        teacher(run)


@task(name="warm start", **REGISTRY_POLICY)
def warm_start(run: Run) -> None:
    """The champion that the training goes on from."""
    registry = registry_of(run.workspace, run.settings)
    config = run.config.training
    run.warm_start = begun_from(run.config.model, config, run.data, registry, run=run.folder, cache=run.workspace.cache)
    run.console.line(f"    warm start: {run.warm_start.told}")


@task(name="teacher", **REGISTRY_POLICY)
def teacher(run: Run) -> None:
    """Whose answers the training learns."""
    config = run.config.training
    assert config.teacher is not None
    registry = registry_of(run.workspace, run.settings) if config.teacher.champion else None
    places = {"run": run.folder, "root": run.workspace.root, "cache": run.workspace.cache}
    run.teacher = learned_from(config.teacher, run.data, registry, **places)
    classes = run.task.classes(list(data_folder.listing(run.workspace.data).classes))
    expect_to_teach(run.teacher, classes, config.task)
    run.console.line(f"    teacher: {run.taught_by}")


@task(name="validation", cache_policy=NO_CACHE)
def validation(run: Run) -> Stored[Dataset]:
    def compute(out: Path, progress: Progress) -> Dataset:
        return validate(
            run.workspace.data,
            run.data,
            run.config.validation,
            out=out,
            accepted=run.settings.accepted,
            hashes=dataversions.pinned_hashes(run.workspace.root),
            members=TestLedger.read(run.workspace.root / TEST_LEDGER).members,
            sources=attributes.sources(run.workspace.root),
            encoder=encoder_of(run.config.training),
            cache=run.workspace.cache,
            num_threads=run.settings.num_threads,
            progress=progress,
        )

    return run.stage("validation", Dataset, compute, inputs=keys.validation_inputs(run))


@task(name="splitting", cache_policy=NO_CACHE)
def splitting(run: Run, dataset: Stored[Dataset]) -> Stored[Splits]:
    def compute(out: Path, progress: Progress) -> Splits:
        ledger = TestLedger.read(run.workspace.root / TEST_LEDGER)
        clusters = Clusters.read(run.workspace.root)
        return split(dataset, ledger, run.config.splitting, run.task, clusters=clusters, out=out, progress=progress)

    splits = run.stage("splitting", Splits, compute, inputs=keys.splitting_inputs(run, dataset))
    for note in splits.record.notes:
        run.console.line(f"    {note}")
    expect_provable(run.config.packaging, splits.record, run.task)  # before a training that would be for nothing
    return splits


@task(name="training", cache_policy=NO_CACHE)
def training(run: Run, splits: Stored[Splits], *, fold: str = "") -> Stored[Checkpoint]:
    """A fold's training is no model of anybody's, so it has no live curves in MLflow."""
    config = run.config.training
    key = keys.training_key(run, splits)

    def compute(out: Path, progress: Progress) -> Checkpoint:
        with contextlib.nullcontext() if fold else _live(run, key) as sink:
            return train(
                splits,
                run.workspace.data,
                config,
                out=out,
                cache=run.workspace.cache,
                root=run.workspace.root,
                num_threads=run.settings.num_threads,
                sink=sink,
                progress=progress,
                champion=run.warm_start.fetch() if run.warm_start else None,
                renamed=run.warm_start.renamed if run.warm_start else (),
                teacher=run.teacher.fetch() if run.teacher else None,
                teacher_renamed=run.teacher.renamed if run.teacher else (),
                plugin_folder=run.plugin_folder,
                ray_address=run.settings.ray_address,
            )

    inputs = keys.training_inputs(run, splits)
    trained = run.stage("training", Checkpoint, compute, inputs=inputs, leftovers=LEFTOVERS, fold=fold)
    for given in (run.warm_start, run.teacher):
        if given is not None:
            keep(given, run.folder)
    return trained


@task(name="optimisation", cache_policy=NO_CACHE)
def optimisation(run: Run, trained: Stored[Checkpoint], splits: Stored[Splits], *, fold: str = "") -> Stored[Checkpoint]:
    """What the recipe's passes make of the trained network; the network itself where it names none."""
    config = run.config.optimisation
    if not config.passes:
        return trained

    def compute(out: Path, progress: Progress) -> Checkpoint:
        return optimise(
            trained,
            splits,
            run.workspace.data,
            config,
            run.config.training,
            out=out,
            cache=run.workspace.cache,
            num_threads=run.settings.num_threads,
            progress=progress,
        )

    inputs = keys.optimisation_inputs(run, trained, splits)
    return run.stage("optimisation", Checkpoint, compute, inputs=inputs, leftovers=LEFTOVERS, fold=fold)


@contextlib.contextmanager
def _live(run: Run, key: str) -> Iterator[LiveMetrics]:
    """Curves in MLflow while a training goes on."""
    sink = LiveMetrics(
        run.settings.tracking_uri,
        run.config.model,
        key,
        artifacts=artifacts_of(run.workspace, run.settings),
        tags={"visionloop.run": run.id, "visionloop.data": run.data.dvc_hash, "visionloop.git": run.lineage.git_commit},
    )
    try:
        yield sink
    finally:
        sink.close()
        if sink.problem:
            run.console.line(f"    live curves are late ({sink.problem}); registration will write them")


@task(name="export graph", cache_policy=NO_CACHE)
def graph(run: Run, checkpoint: Stored[Checkpoint], *, fold: str = "", beside: str = "") -> Stored[Graph]:
    def compute(out: Path, _: Progress) -> Graph:
        return export_graph(checkpoint, out=out, plugin_folder=run.plugin_folder)

    inputs = keys.graph_inputs(run, checkpoint)
    return run.stage("export", Graph, compute, inputs=inputs, instance="graph", fold=fold, beside=beside)


@task(name="export", cache_policy=NO_CACHE)
def engine(
    run: Run,
    checkpoint: Stored[Checkpoint],
    interchange: Stored[Graph],
    splits: Stored[Splits],
    target: TargetConfig,
    *,
    fold: str = "",
    beside: str = "",
) -> Stored[Engine]:
    def compute(out: Path, _: Progress) -> Engine:
        return export(checkpoint, interchange, splits, run.workspace.data, target, out=out, plugin_folder=run.plugin_folder)

    inputs = keys.engine_inputs(run, checkpoint, interchange, splits, target)
    return run.stage("export", Engine, compute, inputs=inputs, instance=target.name, fold=fold, beside=beside)


def engines(
    run: Run, checkpoint: Stored[Checkpoint], interchange: Stored[Graph], splits: Stored[Splits]
) -> list[Stored[Engine]]:
    """The engines of all targets, as many at a time as the flow's task runner allows; see `built`."""
    building = [engine.submit(run, checkpoint, interchange, splits, target) for target in run.targets]
    wait(building)  # also when one failed: the workspace is held until nothing writes into it any more
    return built(run, building)


def built(run: Run, building: Sequence[PrefectFuture[Stored[Engine]]]) -> list[Stored[Engine]]:
    """The engines of the targets; one that is not required and could not be built is absent, and told with its reason.

    Raises ExportError for the others, and where nothing is left that could be judged.
    """
    engines: list[Stored[Engine]] = []
    for target, future in zip(run.targets, building, strict=True):
        try:
            engines.append(future.result())
        except ExportError as error:
            if target.required or target.name in (REFERENCE, run.config.export.serving):
                raise
            run.absent[target.name] = f"could not be built: {error}"
            run.console.line(f"    {target.name}: {run.absent[target.name]}")
    if len(engines) < 2:
        told = "; ".join(f"{name}: {reason}" for name, reason in run.absent.items())
        raise ExportError(f"there is no engine that could serve: {told}")
    return engines


@task(name="evaluation", cache_policy=NO_CACHE)
def evaluation(
    run: Run,
    engine: Stored[Engine],
    splits: Stored[Splits],
    *,
    role: str = "",
    fold: str = "",
    beside: str = "",
    renamed: Renames = (),
) -> Stored[Evaluation]:
    config = run.config.evaluation

    # A champion, the engines of folds and what stands beside are compared with no reference.
    beyond_test = keys.asked_beyond_test(engine) and not role and not fold and not beside

    def compute(out: Path, progress: Progress) -> Evaluation:
        return evaluate(
            engine,
            splits,
            run.workspace.data,
            run.task,
            config,
            out=out,
            renamed=renamed,
            beyond_test=beyond_test,
            progress=progress,
        )

    inputs = keys.evaluation_inputs(run, engine, splits, renamed, beyond_test=beyond_test)
    instance = role or engine.record.name
    return run.stage("evaluation", Evaluation, compute, inputs=inputs, instance=instance, fold=fold, beside=beside)


UNOPTIMISED = "unoptimised"
"""The folder of a run in which the network as it was trained stands beside what passes made of it."""


def passes_cost(
    run: Run,
    trained: Stored[Checkpoint],
    engines: Sequence[Stored[Engine]],
    evaluations: Sequence[Stored[Evaluation]],
    splits: Stored[Splits],
) -> Stored[PassesCost] | None:
    """What the passes cost and bought, by an engine of the trained network; None where that is not asked for."""
    config = run.config.optimisation
    if not config.passes or not config.compare:
        return None
    after = keys.compared_engine(engines, evaluations, config.compared_in)
    target = next(target for target in run.targets if target.name == after[0].record.name)
    interchange = graph(run, trained, beside=UNOPTIMISED)
    built = engine(run, trained, interchange, splits, target, beside=UNOPTIMISED)
    before = built, evaluation(run, built, splits, beside=UNOPTIMISED)

    def compute(_: Path, progress: Progress) -> PassesCost:
        return compare(before, after, splits, run.workspace.data, run.task, run.config.evaluation, progress=progress)

    return run.stage(
        "evaluation", PassesCost, compute, inputs=keys.passes_cost_inputs(run, before, after), instance="passes"
    )


def evaluation_of_champion(run: Run, champion: CurrentChampion, splits: Stored[Splits]) -> Stored[Evaluation]:
    """What the champion answers on today's test images, by today's labels and names of classes."""
    renamed = run.data.renames_since(champion.data)
    return evaluation(run, champion.engine, splits, role="champion", renamed=renamed)


@task(name="slices", cache_policy=NO_CACHE)
def slices(run: Run, dataset: Stored[Dataset], reference: Stored[Evaluation]) -> Stored[SliceTable] | None:
    """Which slices the test images are in; the clusters are those of the reference's embedding. None without answers."""
    if reference.record.predictions is None:
        return None
    facts = facts_of_test(run, dataset, reference)

    def compute(out: Path, _: Progress) -> SliceTable:
        record = reference.record
        predictions = read_frame(reference.folder / PREDICTIONS, ["embedding"])
        return make_slices(
            facts,
            np.stack(list(predictions["embedding"])),
            run.task,
            engine=record.engine,
            engine_digest=record.engine_digest,
            test_digest=record.test_digest,
            out=out,
        )

    inputs = keys.slices_inputs(run, facts, reference)
    return run.stage("evaluation", SliceTable, compute, inputs=inputs, instance="slices")


@task(name="robustness", cache_policy=NO_CACHE)
def robustness(
    run: Run, engine: Stored[Engine], splits: Stored[Splits], *, role: str = "", renamed: Renames = ()
) -> Stored[Robustness]:
    """What an engine answers on corrupted test images."""
    config = run.config.evaluation

    def compute(out: Path, progress: Progress) -> Robustness:
        return answer_corrupted(
            engine,
            splits,
            run.workspace.data,
            run.task,
            num_images=config.robustness_images,
            num_threads=config.num_threads,
            out=out,
            renamed=renamed,
            progress=progress,
        )

    inputs = keys.corrupted_inputs(run, engine, splits, renamed)
    return run.stage(
        "evaluation", Robustness, compute, inputs=inputs, instance=keys.corrupted_of(role or engine.record.name)
    )


def robustness_of_champion(run: Run, champion: CurrentChampion, splits: Stored[Splits]) -> Stored[Robustness] | None:
    """What the champion answers on the same images; None where the recipe corrupts none."""
    if not run.config.evaluation.robustness_images:
        return None
    return robustness(run, champion.engine, splits, role="champion", renamed=run.data.renames_since(champion.data))


@task(name="measurement", cache_policy=NO_CACHE)
def measurements(
    run: Run, engines: Sequence[Stored[Engine]], splits: Stored[Splits], *, anew: bool = False
) -> list[Stored[Measurement]]:
    """Latencies of all engines, measured in turns; what is stored counts, unless it was noisy or is wanted `anew`."""
    config = run.config.evaluation
    measured: dict[str, Measurement] = {}

    def name(engine: Stored[Engine]) -> str:
        return keys.latency_of(engine.record.name)

    before = {
        e.record.name: run.stored("evaluation", Measurement, inputs=keys.measurement_inputs(run, e), instance=name(e))
        for e in engines
    }
    wanted = [
        e for e in engines if anew or (kept := before[e.record.name]) is None or keys.worth_measuring_again(kept.record)
    ]

    def found(engine: Stored[Engine]) -> Stored[Measurement]:
        def compute(_: Path, progress: Progress) -> Measurement:
            if not measured:
                taken = measure(wanted, splits, run.workspace.data, config, progress=progress)
                measured.update(
                    {record.engine: with_memory(run, engine, record) for engine, record in zip(wanted, taken, strict=True)}
                )
            record, kept = measured[engine.record.name], before[engine.record.name]
            if kept is None or anew:
                return record
            attempts = record.num_attempts + kept.record.num_attempts
            better = min(record, kept.record, key=lambda one: one.spread)
            return better.model_copy(update={"num_attempts": attempts})

        return run.stage(
            "evaluation",
            Measurement,
            compute,
            inputs=keys.measurement_inputs(run, engine),
            instance=name(engine),
            anew=engine in wanted,
        )

    return [found(engine) for engine in engines]


def with_memory(run: Run, engine: Stored[Engine], measured: Measurement) -> Measurement:
    """With the memory that the engine takes, where the recipe limits it: a process of its own takes a while to start."""
    if run.config.export.limits.memory_mb is None or measured.status != "measured":
        return measured
    try:
        needed = memory_mb(engine, num_threads=run.config.evaluation.num_threads, plugin_folder=run.plugin_folder)
    except ExportError as error:
        # Then it meets no limit of memory, and another engine may be served.
        told = f"the memory of {engine.record.name} was not measured: {error}"
        run.console.line(f"    {told}; `train --measure-again` tries anew")
        return measured
    return measured.model_copy(update={"memory_mb": needed})


@task(name="champion", **REGISTRY_POLICY)
def champion(run: Run) -> CurrentChampion | None:
    """Today's champion, or None where the ledger proves that none was ever promoted.

    Raises RegistryUnavailable when the ledger has lost rows that MLflow knows of: then nothing is proven.
    """
    registry = registry_of(run.workspace, run.settings)
    entry = registry.champion(run.config.model)
    if entry is None:
        return None
    folder = run.workspace.cache / "champions" / run.config.model
    return registry.fetch_champion(run.config.model, entry, out=folder)


@task(name="gating", cache_policy=NO_CACHE)
def gating(
    run: Run,
    engines: Sequence[Stored[Engine]],
    evaluations: Sequence[Stored[Evaluation]],
    measurements: Sequence[Stored[Measurement]],
    current_champion: CurrentChampion | None,
    champion_evaluation: Stored[Evaluation] | None,
    sliced: Stored[SliceTable] | None,
    corrupted: Sequence[Stored[Robustness]] = (),
    champion_corrupted: Stored[Robustness] | None = None,
    unserved: Mapping[str, Finding] | None = None,
) -> Stored[Verdict]:
    """What the gates say; `unserved` are the engines that were chosen before in this run and did not serve."""
    config, chosen = run.config.gating, run.config.export
    required = {target.name: target.required for target in chosen.all_targets}
    renamed = run.data.renames_since(current_champion.data) if current_champion else ()

    def compute(_: Path, __: Progress) -> Verdict:
        champion = None
        if current_champion and champion_evaluation:
            champion = Champion(current_champion.engine.record, champion_evaluation, renamed, champion_corrupted)
        judged = [
            Judged(engine, evaluation, measurement.record, required[engine.record.name])
            for engine, evaluation, measurement in zip(engines, evaluations, measurements, strict=True)
        ]
        return judge(
            judged[1:],
            evaluations[0],
            champion,
            config,
            run.task,
            serving=chosen.serving,
            limits=chosen.limits,
            champion_known=True,
            absent={name: (reason, required[name]) for name, reason in run.absent.items()},
            slices=sliced,
            corrupted=corrupted,
            unserved=unserved,
        )

    inputs = keys.gating_inputs(
        run,
        engines,
        evaluations,
        measurements,
        champion_evaluation,
        sliced,
        renamed,
        corrupted=corrupted,
        champion_corrupted=champion_corrupted,
        unserved=unserved,
    )
    return run.stage("gating", Verdict, compute, inputs=inputs)


@task(name="packaging", cache_policy=NO_CACHE)
def packaging(run: Run, engines: Sequence[Stored[Engine]], splits: Stored[Splits], verdict: Verdict) -> Stored[Release]:
    config, training_config = run.config.packaging, run.config.training
    serving = next(stored for stored in engines if stored.record.name == verdict.serving_engine)
    task_settings = dict(training_config.task_settings)

    def compute(out: Path, progress: Progress) -> Release:
        return package(
            run.config.model,
            serving,
            splits,
            run.workspace.data,
            (training_config.task, task_settings),
            config,
            num_threads=run.settings.num_threads,
            out=out,
            progress=progress,
        )

    return run.stage("packaging", Release, compute, inputs=keys.packaging_inputs(run, serving, splits))


@task(name="serving_check", cache_policy=NO_CACHE)
def serving_check(run: Run, release: Stored[Release]) -> Finding:
    """What a server with the release answered, as a finding of its engine."""
    inputs = keys.serving_check_inputs(run, release)
    kept = run.stored("serving_check", ServingCheck, inputs=inputs)

    def compute(out: Path, _: Progress) -> ServingCheck:
        return check(release, out=out, plugin_folder=run.plugin_folder)

    anew = kept is not None and kept.record.timed_out
    return run.stage("serving_check", ServingCheck, compute, inputs=inputs, anew=anew).record.finding


@task(name="evidence", cache_policy=NO_CACHE)
def evidence(
    run: Run,
    engines: Sequence[Stored[Engine]],
    evaluations: Sequence[Stored[Evaluation]],
    verdict: Verdict,
    current_champion: CurrentChampion | None,
    champion_evaluation: Stored[Evaluation] | None,
    sliced: Stored[SliceTable] | None,
    splits: Stored[Splits],
    checkpoint: Stored[Checkpoint],
) -> Stored[CandidateEvidence]:
    """What a person looks at of the engine that serves, or of the reference where that one could not run."""
    evaluation = shown_of(evaluations, verdict.serving_engine)
    engine = next(stored for stored in engines if stored.record.name == evaluation.record.engine)
    renamed = run.data.renames_since(current_champion.data) if current_champion else ()

    def compute(out: Path, progress: Progress) -> CandidateEvidence:
        champion = None
        if current_champion and champion_evaluation:
            champion = Compared(champion_evaluation, names_after(current_champion.engine.record.classes, renamed))
        return collect(
            engine,
            evaluation,
            champion,
            sliced,
            splits,
            checkpoint,
            run.workspace.data,
            run.task,
            run.config.evidence,
            num_threads=run.settings.num_threads,
            out=out,
            progress=progress,
        )

    inputs = keys.evidence_inputs(run, engine, evaluation, champion_evaluation, sliced, splits, checkpoint, renamed)
    return run.stage("evidence", CandidateEvidence, compute, inputs=inputs)


@task(name="registration", **REGISTRY_POLICY)
def registration(run: Run, results: Results) -> Outcome:
    """Record the outcome in MLflow and the ledger; the ledger decides whether that happened before."""
    from flows.training.bundle import assemble

    registry = registry_of(run.workspace, run.settings)
    with run.console.stage("registration", run.console.total) as (_, cached):
        known = registry.recorded(run.config.model, candidate_digest(run, results))
        if known is not None:
            cached.append(True)
        outcome = known or registry.register(assemble(run, results))
        if known is None:
            _tell(run, outcome)
        folder = run.folder / f"{run.console.total}-registration"
        folder.mkdir(exist_ok=True)
        write_atomically(folder / "outcome.json", json.dumps(outcome.to_json(), indent=1).encode())
    return outcome


def _tell(run: Run, outcome: Outcome) -> None:
    by = run.requested_by or "flows/train"
    if isinstance(outcome, Candidate):
        event: Event = "requested"
        facts = {"version": outcome.version, "by": by, "reason": f"run {run.id}", "seq": outcome.ledger_seq}
    elif not isinstance(outcome, Rejection):
        event = "undecided"
        facts = {"version": outcome.version, "by": by, "reason": "; ".join(outcome.reasons), "seq": outcome.ledger_seq}
    else:
        event = "rejected"
        facts = {
            "version": "(none)",
            "by": "the gates",
            "requested_by": by,
            "verdict": outcome.status,
            "reason": "; ".join(outcome.reasons),
            "seq": outcome.ledger_seq,
        }
    notify(run.settings, event, run.config.model, facts, say=lambda line: run.console.line(f"    {line}"))
