"""What each stage's result depends on: the inputs of its key in the store."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from components import pass_costs, plugins, robustness, slices
from components.contracts.data import Dataset, Renames, Splits
from components.contracts.models import Checkpoint, Engine, Precision
from components.contracts.records import Stored, canonical_json, sha256_text
from components.contracts.releases import Release
from components.contracts.verdicts import Evaluation, Finding, Measurement, Robustness, SliceTable
from components.embeddings import absence
from components.export import REFERENCE, Graph, TargetConfig
from components.issues import chosen as chosen_findings
from components.machine import fingerprint
from components.optimisation import fine_tuning
from components.phases import Phase
from components.store import sha256_file
from components.training import TrainingConfig, local_weights
from components.validation import ValidationConfig
from flows.training.run import Run
from flows.workspace.checking import encoder_of

if TYPE_CHECKING:
    import pandas as pd

_CODE = Path(__file__).resolve().parents[2]
UNSERVED = "unserved"
"""The input of gating that names the engines which were chosen before and did not serve."""


def validation_inputs(run: Run) -> dict[str, str]:
    return {
        "data": run.data.digest(),
        "config": run.config.validation.digest(),
        "accepted": canonical_json(dataclasses.asdict(run.settings.accepted)),
        "embeddings": _embeddings(run.config.training),
        **_of_findings(run.config.validation),
    }


def _embeddings(config: TrainingConfig) -> str:
    """Names what validation embeds by, which is another thing once the weights are there."""
    found = encoder_of(config)
    return "" if found is None else f"{found.key} {absence(found)}"


def _of_findings(config: ValidationConfig) -> dict[str, str]:
    """Source digests of what is looked for."""
    found: dict[str, str] = {}
    for each in chosen_findings(config.findings):
        found |= member_digests(findings=each.finding)
    return found


def splitting_inputs(run: Run, dataset: Stored[Dataset]) -> dict[str, str]:
    return {"dataset": dataset.record.digest(), "config": run.config.splitting.digest(), **task_inputs(run)}


def training_inputs(run: Run, splits: Stored[Splits]) -> dict[str, str]:
    config = run.config.training
    local = local_weights(config, run.workspace.root)
    begun_from = run.warm_start.weights if run.warm_start else ""
    renamed = run.warm_start.renamed if run.warm_start else ()
    return {
        **({"renamed": canonical_json(renamed)} if renamed else {}),
        "weights": sha256_file(local) if local else begun_from,
        "splits": splits.record.digest(),
        "config": config.digest(),
        "num_threads": str(run.settings.num_threads),
        **({"device": run.compute.key} if run.compute.key else {}),
        **training_members(config),
        **_of_teacher(run),
    }


def training_members(config: TrainingConfig) -> dict[str, str]:
    """Source digests of the plug-ins that a training names."""
    return {**member_digests(backbones=config.backbone, tasks=config.task), **_of_phases(config.all_phases)}


def _of_teacher(run: Run) -> dict[str, str]:
    """What a teacher answers depends on; nothing without one."""
    if run.teacher is None:
        return {}
    renamed = {"teacher_renamed": canonical_json(run.teacher.renamed)} if run.teacher.renamed else {}
    code = member_digests(backbones=run.teacher.backbone) if run.teacher.backbone else {}
    return {"teacher": run.teacher.digest, **renamed, **{f"teacher/{name}": digest for name, digest in code.items()}}


def _of_phases(phases: Sequence[Phase]) -> dict[str, str]:
    """Source digests of the losses and augmentations that the phases name."""
    found: dict[str, str] = {}
    for phase in phases:
        found |= member_digests(losses=phase.loss.loss) if phase.loss is not None else {}
        for chosen in phase.all_augmentations:
            found |= member_digests(augmentations=chosen.augmentation)
    return found


def optimisation_inputs(run: Run, trained: Stored[Checkpoint], splits: Stored[Splits]) -> dict[str, str]:
    config, training = run.config.optimisation, run.config.training
    phases = [phase for chosen in config.passes for phase in fine_tuning(chosen, training)]
    passes: dict[str, str] = {}
    for chosen in config.passes:
        passes |= member_digests(passes=chosen.pass_)
    return {
        "checkpoint": trained.record.digest(),
        "splits": splits.record.digest(),
        # Whether the network of before is compared with changes nothing of what comes of it.
        "config": config.model_copy(update={"compare": True}).digest(),
        # A fine-tuning that nothing was said of is like the last phase of the training.
        "training": training.digest(),
        "num_threads": str(run.settings.num_threads),
        **({"device": run.compute.key} if run.compute.key else {}),
        **member_digests(backbones=training.backbone, tasks=training.task),
        **passes,
        **_of_phases(phases),
    }


def training_key(run: Run, splits: Stored[Splits]) -> str:
    """What the MLflow run of this training is found by."""
    return run.key("training", training_inputs(run, splits))


def graph_inputs(run: Run, checkpoint: Stored[Checkpoint]) -> dict[str, str]:
    return {"checkpoint": checkpoint.record.digest(), **_module_digests(run)}


def _module_digests(run: Run) -> dict[str, str]:
    return member_digests(backbones=run.config.training.backbone, tasks=run.config.training.task)


def engine_inputs(
    run: Run, checkpoint: Stored[Checkpoint], interchange: Stored[Graph], splits: Stored[Splits], target: TargetConfig
) -> dict[str, str]:
    return {
        "checkpoint": checkpoint.record.digest(),
        "graph": interchange.record.digest(),
        "splits": splits.record.digest(),
        # Whether it is required decides about the verdict, and how long it may take about whether there is one at all.
        "config": target.model_copy(update={"required": True, "time_limit_s": 1}).digest(),
        "built_by": plugins.load("targets", target.target, target.settings).built_by(),
        **member_digests(targets=target.target),
        **_module_digests(run),
    }


def evaluation_inputs(
    run: Run, engine: Stored[Engine], splits: Stored[Splits], renamed: Renames = (), *, beyond_test: bool = False
) -> dict[str, str]:
    return {
        **({"beyond_test": splits.record.digest()} if beyond_test else {}),
        **({"renamed": canonical_json(renamed)} if renamed else {}),
        "engine": engine.record.digest(),
        "test": splits.record.test_digest,
        "classes": ", ".join(splits.record.classes),
        "num_threads": str(run.config.evaluation.num_threads),
        **task_inputs(run),
        # Whether an engine can run is a property of the machine.
        "machine": fingerprint(),
        # A champion's target may be a plug-in that the workspace has no more.
        **(member_digests(targets=engine.record.target) if engine.record.target in plugins.names("targets") else {}),
    }


def compared_engine(
    engines: Sequence[Stored[Engine]], evaluations: Sequence[Stored[Evaluation]], precision: Precision
) -> tuple[Stored[Engine], Stored[Evaluation]]:
    """The engine by which passes are compared with what was there before: the first in `precision` that could serve here.

    Without one it is the first in fp32, and without that the reference.
    """
    pairs = list(zip(engines, evaluations, strict=True))
    able = [pair for pair in pairs[1:] if pair[1].record.status == "evaluated"]
    wanted = [pair for name in (precision, "fp32") for pair in able if pair[0].record.precision == name]
    return (wanted or pairs)[0]


def passes_cost_inputs(
    run: Run, before: tuple[Stored[Engine], Stored[Evaluation]], after: tuple[Stored[Engine], Stored[Evaluation]]
) -> dict[str, str]:
    return {
        "before": before[1].record.digest(),
        "after": after[1].record.digest(),
        "source": plugins.source_digest(Path(pass_costs.__file__)),
        **measurement_inputs(run, after[0]),
        **task_inputs(run),
    }


def asked_beyond_test(engine: Stored[Engine]) -> bool:
    """Whether an engine of this run answers the valid and calibration images as well: parity in fp32 needs no labels."""
    return engine.record.precision == "fp32"


def slices_inputs(run: Run, facts: pd.DataFrame, reference: Stored[Evaluation]) -> dict[str, str]:
    return {
        "facts": sha256_text(facts.to_csv(index=False)),
        "evaluation": reference.record.digest(),
        # The stage evaluation is keyed by the source of another module.
        "source": plugins.source_digest(Path(slices.__file__)),
        **task_inputs(run),
    }


def asked_corrupted(
    run: Run, engines: Sequence[Stored[Engine]], evaluations: Sequence[Stored[Evaluation]]
) -> list[Stored[Engine]]:
    """The engines that are shown corrupted images: those that could serve here, one for all in fp32.

    Engines in fp32 of one checkpoint answer alike, which parity proves on every image outside training.
    """
    asked: list[Stored[Engine]] = []
    for engine, evaluation in zip(engines, evaluations, strict=True):
        record = engine.record
        stands_in = record.precision == "fp32" and any(other.record.precision == "fp32" for other in asked)
        if record.name != REFERENCE and evaluation.record.status == "evaluated" and not stands_in:
            asked.append(engine)
    return asked if run.config.evaluation.robustness_images else []


def corrupted_inputs(run: Run, engine: Stored[Engine], splits: Stored[Splits], renamed: Renames = ()) -> dict[str, str]:
    return {
        **evaluation_inputs(run, engine, splits, renamed),
        "source": plugins.source_digest(Path(robustness.__file__)),
        "images": str(run.config.evaluation.robustness_images),
    }


def corrupted_of(name: str) -> str:
    """The instance of the stage evaluation in which an engine is shown corrupted images."""
    return f"{name}-corrupted"


def measurement_inputs(run: Run, engine: Stored[Engine]) -> dict[str, str]:
    return {
        "engine": engine.record.digest(),
        # Neither folds nor corrupted images say anything of an engine's latency.
        "config": run.config.evaluation.model_copy(update={"folds": 0, "robustness_images": 0}).digest(),
        "machine": fingerprint(),
        **({"memory": "wanted"} if run.config.export.limits.memory_mb is not None else {}),
        **member_digests(targets=engine.record.target),
    }


def latency_of(engine: str) -> str:
    """The instance of the stage evaluation that measures an engine."""
    return f"{engine}-latency"


def worth_measuring_again(kept: Measurement) -> bool:
    """A machine that is noisy every time is so by nature: it is not measured at every run for ever."""
    return kept.noisy and kept.num_attempts < 6


def gating_inputs(
    run: Run,
    engines: Sequence[Stored[Engine]],
    evaluations: Sequence[Stored[Evaluation]],
    measurements: Sequence[Stored[Measurement]],
    champion_evaluation: Stored[Evaluation] | None,
    sliced: Stored[SliceTable] | None,
    renamed: Renames = (),
    *,
    corrupted: Sequence[Stored[Robustness]] = (),
    champion_corrupted: Stored[Robustness] | None = None,
    unserved: Mapping[str, Finding] | None = None,
) -> dict[str, str]:
    config = run.config.gating
    inputs = {
        **({"renamed": canonical_json(renamed)} if renamed else {}),
        "config": config.digest(),
        "export": run.config.export.digest(),
        # With the reasons, which the verdict tells.
        "absent": canonical_json(run.absent),
        **task_inputs(run),
        "champion": champion_evaluation.record.digest() if champion_evaluation else "none",
        "slices": sliced.record.digest() if sliced else "none",
        **({"champion.corrupted": champion_corrupted.record.digest()} if champion_corrupted else {}),
        **{f"{stored.record.engine}.corrupted": stored.record.digest() for stored in corrupted},
        **({UNSERVED: canonical_json({name: found.to_json() for name, found in unserved.items()})} if unserved else {}),
    }
    for engine, evaluation, measurement in zip(engines, evaluations, measurements, strict=True):
        name = engine.record.name
        inputs |= {f"{name}.evaluation": evaluation.record.digest(), f"{name}.measurement": measurement.record.digest()}
    for gate in config.gates:
        inputs |= member_digests(gates=gate.gate)
    return inputs


def evidence_inputs(
    run: Run,
    engine: Stored[Engine],
    evaluation: Stored[Evaluation],
    champion_evaluation: Stored[Evaluation] | None,
    sliced: Stored[SliceTable] | None,
    splits: Stored[Splits],
    checkpoint: Stored[Checkpoint],
    renamed: Renames = (),
) -> dict[str, str]:
    return {
        "engine": engine.record.digest(),
        "evaluation": evaluation.record.digest(),
        "champion": champion_evaluation.record.digest() if champion_evaluation else "none",
        "renamed": canonical_json(renamed),
        "slices": sliced.record.digest() if sliced else "none",
        "splits": splits.record.digest(),
        "checkpoint": checkpoint.record.digest(),
        "config": run.config.evidence.digest(),
        **task_inputs(run),
        # The embeddings of training pictures are this processor's.
        "machine": fingerprint(),
        **member_digests(targets=engine.record.target, backbones=run.config.training.backbone),
    }


def packaging_inputs(run: Run, serving: Stored[Engine], splits: Stored[Splits]) -> dict[str, str]:
    return {
        "model": run.config.model,
        "engine": serving.record.digest(),
        "splits": splits.record.digest(),
        "config": run.config.packaging.digest(),
        **task_inputs(run),
        # Its answers are this processor's.
        "machine": fingerprint(),
        **member_digests(targets=serving.record.target),
    }


def serving_check_inputs(run: Run, release: Stored[Release]) -> dict[str, str]:
    return {
        "release": release.record.digest(),
        "serving": serving_source(),
        "accepted": canonical_json(dataclasses.asdict(run.settings.accepted)),
        "num_threads": str(run.settings.num_threads),
        "machine": fingerprint(),
        **task_inputs(run),
        **member_digests(targets=release.record.engine.target),
    }


@functools.cache
def serving_source() -> str:
    """Digest of what `visionloop serve` runs: its command, `serving/`, and all of ours that these import."""
    own = [_CODE / "flows" / "cli" / "serving.py", _CODE / "flows" / "loop" / "serving.py"]
    files = plugins.sources(*own, *(_CODE / "serving").rglob("*.py"), _CODE / "flows" / "training" / "trial_server.py")
    told = sorted((file.relative_to(_CODE).as_posix(), sha256_file(file)) for file in files)
    return sha256_text(canonical_json(told))


def task_inputs(run: Run) -> dict[str, str]:
    """The task as an input of stages."""
    settings = canonical_json(dict(run.config.training.task_settings))
    return {"task_settings": settings, **member_digests(tasks=run.config.training.task)}


def member_digests(**members: str) -> dict[str, str]:
    """Source digests of the plug-ins a stage uses, as stage inputs: member_digests(backbones="small_cnn")."""
    return {f"{family}/{name}": plugins.member_digest(family, name) for family, name in members.items()}
