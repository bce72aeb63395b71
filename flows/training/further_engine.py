"""One more engine of a version that is registered already, by the stages that a training goes through.

It is built from the registered weights, answers the same test images and is judged by the gates of the version's own recipe,
beside the champion of then, as it would have been had that training built it. No version, approval or promotion changes.
All stages lie in the store under the keys that a training gives them: what the training built, or what was asked for before,
is there already.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from components import plugins
from components.contracts.data import Dataset, SplitName, Splits
from components.contracts.errors import ConfigError, DataDiffers
from components.contracts.models import Checkpoint, Engine
from components.contracts.records import Stored
from components.contracts.verdicts import EngineVerdict, Evaluation, Measurement, SliceTable
from components.contracts.wording import counted
from components.export import REFERENCE, TargetConfig, check
from components.samples import rows
from components.store import sha256_file
from flows import stopping
from flows.terminal import Console
from flows.training.keys import asked_corrupted
from flows.training.run import STAGES, Run
from flows.workspace.desk import Desk, registry_of
from flows.workspace.judged_engines import further_folder
from flows.workspace.recipes import RunConfig
from registry import approval
from registry.models import CurrentChampion

_LOOKED_AT: tuple[SplitName, ...] = ("valid", "calibration", "test")
"""The splits whose pictures an engine is built and judged with."""


@dataclass(frozen=True)
class FurtherEngine:
    """An engine that was built after its version was registered, and what its gates said."""

    version: str
    engine: Engine
    verdict: EngineVerdict
    evaluation: Evaluation
    measurement: Measurement
    folder: Path
    """The engine's files."""
    was_there: bool
    """Whether the store held the engine already."""


def build(desk: Desk, version: str, target: TargetConfig, *, quiet: bool, measure_again: bool = False) -> FurtherEngine:
    """Build, evaluate and judge an engine of a registered version; the same again finds what is there.

    With `measure_again` it is timed anew.

    Raises UnknownName, ConfigError for what cannot be built, DataDiffers where the pictures that the version was judged on
    are not in `data/`, ExportError, and what the registry raises.
    """
    entries = desk.ledger.entries(desk.model)
    state = approval.state_of(entries, version, desk.ledger.now())
    workspace, registry = desk.workspace, registry_of(desk.workspace, desk.settings)
    with (
        workspace.locked("visionloop engine build"),
        registry.bundle(desk.model, state.version, state.requested.body["manifest_sha256"]) as (folder, _),
        Console(len(STAGES), quiet=quiet) as console,
        stopping.at_once(console.stopped),
    ):
        evidence = folder / "evidence"
        config = _config(RunConfig.read(json.loads((evidence / "config.json").read_text())), target)
        data = Dataset.read(json.loads((evidence / "dataset.json").read_text())).data
        checkpoint = Stored(Checkpoint.read(json.loads((evidence / "checkpoint.json").read_text())), folder / "checkpoint")
        splits = Stored(Splits.read(json.loads((evidence / "splits.json").read_text())), evidence)
        _expect_pictures(splits, workspace.data, version, data.dvc_hash)
        run = Run(workspace, config, data, desk.settings, console)
        # Beside the runs: it is none, and what it links is reached as long as it is there.
        run.folder = further_folder(desk, state.version, target.name)
        before = approval.compared_with(entries, state.requested)
        champion = (
            registry.fetch_champion(desk.model, before, out=workspace.cache / "champions" / "then") if before else None
        )
        return _judged(run, state.version, checkpoint, splits, champion, _slices(evidence), anew=measure_again)


def _config(config: RunConfig, target: TargetConfig) -> RunConfig:
    """The version's recipe with this engine alone, which decides; raises ConfigError."""
    if target.name == REFERENCE:
        raise ConfigError(f"{REFERENCE} is the yardstick that every engine is compared with; build another one")
    chosen = config.export.model_copy(update={"targets": (target,), "serving": target.name})
    check(chosen)
    if reason := plugins.load("targets", target.target, target.settings).absent():
        raise ConfigError(f"{target.name} cannot be built on this machine: {reason.removeprefix('not built here: ')}")
    return config.model_copy(update={"export": chosen})


def _expect_pictures(splits: Stored[Splits], data: Path, version: str, dvc_hash: str) -> None:
    """Raise DataDiffers unless `data/` holds what the version was judged on, whatever else came since."""
    missing, total = [], 0
    for name in _LOOKED_AT:
        table = rows(splits, name)
        total += len(table)
        for path, digest in zip(table["path"], table["sha256"], strict=True):
            if not (data / path).is_file() or sha256_file(data / path) != digest:
                missing.append(path)
    if missing:
        raise DataDiffers(
            f"{len(missing)} of {counted(total, 'picture')} that version {version} was judged with are not in data/ as they "
            f"were, {missing[0]} among them. Bring data version {dvc_hash[:12]} back (check out the commit of it, "
            f"`visionloop data log` names it, and run `visionloop data pull`), and run the same command again"
        )


def _slices(evidence: Path) -> Stored[SliceTable] | None:
    """The slices that the version was judged by; older versions have none."""
    record = evidence / "slices.json"
    return Stored(SliceTable.read(json.loads(record.read_text())), evidence) if record.is_file() else None


def _judged(
    run: Run,
    version: str,
    checkpoint: Stored[Checkpoint],
    splits: Stored[Splits],
    champion: CurrentChampion | None,
    sliced: Stored[SliceTable] | None,
    *,
    anew: bool,
) -> FurtherEngine:
    # Outside of a flow the stages are called as plain functions: nothing of this needs a Prefect server.
    from flows.training import steps

    graph = steps.graph.fn(run, checkpoint)
    engines = [steps.engine.fn(run, checkpoint, graph, splits, target) for target in run.targets]
    evaluations = [steps.evaluation.fn(run, engine, splits) for engine in engines]
    corrupted = [steps.robustness.fn(run, asked, splits) for asked in asked_corrupted(run, engines, evaluations)]
    measurements = steps.measurements.fn(run, engines, splits, anew=anew)
    compared, champion_corrupted = None, None
    if champion is not None:
        renamed = run.data.renames_since(champion.data)
        compared = steps.evaluation.fn(run, champion.engine, splits, role="champion", renamed=renamed)
        if corrupted:
            champion_corrupted = steps.robustness.fn(run, champion.engine, splits, role="champion", renamed=renamed)
    verdict = steps.gating.fn(
        run, engines, evaluations, measurements, champion, compared, sliced, corrupted, champion_corrupted
    )
    engine = engines[-1]
    return FurtherEngine(
        version=version,
        engine=engine.record,
        verdict=verdict.record.engines[0],
        evaluation=evaluations[-1].record,
        measurement=measurements[-1].record,
        folder=engine.folder,
        was_there=run.console.durations[f"export {engine.record.name}"][1],
    )
