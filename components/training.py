"""Training: Splits -> Checkpoint. Phases, one after the other: a head, the last blocks or everything (components/phases.py).

The temperature of the answer is fitted on the valid split (Guo et al. 2017).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from components import launching, phases, plugins, ray_cluster, segments
from components.collectives import first_alone
from components.compute import Compute, ComputeConfig, expect_parts, on_a_cluster, resolve
from components.computed_heads import compute as compute_head
from components.contracts.data import Renames, SplitName, Splits, names_after
from components.contracts.errors import CheckpointMismatch, ConfigError, UnknownName, WeightsUnavailable
from components.contracts.families import Backbone, Task
from components.contracts.models import Checkpoint
from components.contracts.progress import MetricSink, NullSink, Progress, silent
from components.contracts.records import Record, Stored, canonical_json, sha256_text
from components.contracts.wording import counted
from components.distillation import Teacher, Teaching, differing
from components.features import AS_IT_IS, Frozen, maps
from components.fitting import Examples, FitResult, FittingConfig, InMemory, Inputs, LogitsOf, fit, predict, write_history
from components.hooks import Checkpointing, Hook, MetricLogging, ProgressReporting
from components.phases import Augmentation, LastBlocks, Phase
from components.pictures import prepared
from components.ray_address import NO_CLUSTER, RayAddress
from components.samples import rows
from components.segments import Kept
from components.store import describe, sha256_file
from components.weights import from_safetensors, tensor_names

if TYPE_CHECKING:
    import torch
    from torch import nn

    from components.checkpoints import ImageModel


class TrainingConfig(Record):
    """Which network, from which weights, fitted in which phases.

    A training of one phase may say `mode`, `augmentation` and `fit` in place of `phases`; as JSON it is what was said.
    """

    backbone: str
    backbone_settings: dict[str, bool | int | float | str] = {}
    task: str = "classification"
    task_settings: dict[str, bool | int | float | str] = {}
    weights: str = "random"
    """`random`, a name that the backbone knows, `champion`, or the path of a local .safetensors file of the backbone.

    `champion` goes on from the whole network of the model's champion, of the same classes, whatever they are called
    now. Of a checkpoint's file the backbone is taken, and the head is made anew.
    """
    mode: Literal["scratch", "frozen"] = "scratch"
    """`scratch` trains every parameter, `frozen` trains a head on cached features of the backbone."""
    augmentation: Augmentation = Augmentation()
    fit: FittingConfig = FittingConfig()
    phases: tuple[Phase, ...] = Field(default=(), min_length=1)
    """Each goes on from the best epoch of the one before."""
    compute: ComputeConfig = ComputeConfig()
    """Of all phases; as JSON it is left out where nothing is changed."""
    teacher: Teacher | None = None
    """Whose answers every phase learns beside the labels, such as `{champion: photographs}`; None for labels alone."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        both = [key for key in _ONE_PHASE if key in self.model_fields_set]
        if self.phases and both:
            raise ValueError(
                f"{' and '.join(both)} beside phases: each phase says what trains, on what augmentation and with what fit; "
                f"move {'it' if len(both) == 1 else 'them'} into a phase, such as training.phases.0.fit, or remove phases"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        left_out: tuple[str, ...] = _ONE_PHASE if self.phases else ("phases",)
        left_out += ("compute",) if self.compute == ComputeConfig() else ()
        left_out += () if self.teacher else ("teacher",)
        return {key: value for key, value in handler(self).items() if key not in left_out}

    @property
    def all_phases(self) -> tuple[Phase, ...]:
        """The phases, however they were said."""
        trains: Literal["head", "all"] = "head" if self.mode == "frozen" else "all"
        return self.phases or (Phase(trains=trains, augmentation=self.augmentation, fit=self.fit),)

    def place(self, number: int) -> str:
        """Where a recipe keeps the phase of this number, counted from one."""
        return f"training.phases.{number - 1}" if self.phases else "training"


_ONE_PHASE = ("mode", "augmentation", "fit")
CHAMPION = "champion"
"""The weights that are those of the model's champion."""


def local_weights(config: TrainingConfig, root: Path) -> Path | None:
    """The weights file that the section names, relative to the workspace `root`; None for weights known by name."""
    return root / config.weights if config.weights.endswith(".safetensors") else None


def begins_from_a_model(config: TrainingConfig, root: Path) -> bool:
    """Whether the section's weights are those of a model of ours, the champion or a checkpoint's file, or one teaches it.

    Such a model may have learned from any of the images, and what it learned is passed on. Raises WeightsUnavailable for a
    file that cannot be read.
    """
    if config.weights == CHAMPION or config.teacher is not None:
        return True
    local = local_weights(config, root)
    return local is not None and any(_is_of_checkpoint(name) for name in tensor_names(local))


def _is_of_checkpoint(name: str) -> bool:
    """Whether a tensor is called as the backbone's are in checkpoints of ours, which hold a head beside it."""
    return name.startswith("backbone.")


def check(config: TrainingConfig, root: Path) -> None:
    """Raise ConfigError for a section that cannot work, before any work is done."""
    backbone: Backbone = plugins.load("backbones", config.backbone, dict(config.backbone_settings))
    task: Task = plugins.load("tasks", config.task, dict(config.task_settings))
    local = local_weights(config, root)
    known = ("random", *backbone.weights_choices, CHAMPION)
    if local is None and config.weights not in known:
        raise UnknownName(
            f"training.weights for backbone {config.backbone!r}", config.weights, [*known, "<path>.safetensors"]
        )
    if local is not None and not local.is_file():
        raise ConfigError(f"training.weights: {local} does not exist")
    if config.teacher is not None and not getattr(task, "one_class", False):
        raise ConfigError(
            f"training.teacher: what a teacher answers is learned for tasks with one class an image, and {config.task!r} is "
            f"none; remove it"
        )
    for number, phase in enumerate(config.all_phases, 1):
        place = config.place(number)
        if phase.trains != "all" and number == 1 and config.weights == "random":
            raise ConfigError(
                f"{place}: training {phase.part} on random weights learns nothing; choose training.weights from: "
                f"{', '.join(backbone.weights_choices) or '<path>.safetensors'}"
            )
        if phase.batch_norm == "frozen" and number == 1 and config.weights == "random":
            raise ConfigError(
                f"{place}.batch_norm: statistics of random weights are none to keep; remove it, or choose pretrained weights"
            )
        phases.check(phase, place, task)
        if phase.head is not None and config.teacher is not None:
            raise ConfigError(
                f"{place}.head: {phase.head} computes the head from labels alone, and training.teacher has no effect on it; "
                f"remove one of them"
            )
        # How many images there are is known later.
        expect_parts(config.compute, phase.fit.batch_size, phase.fit.batch_size, f"{place}.fit")
        if isinstance(phase.trains, LastBlocks):
            check_blocks(config, phase, phase.trains.last, place)


def on_this_machine(
    config: TrainingConfig, num_threads: int | None = None, ray_address: RayAddress | None = None
) -> Compute:
    """What the section computes on; raises ConfigError where it cannot, as far as threads and address are known."""
    if config.compute.launcher == "ray":
        if ray_address is not None:
            ray_cluster.expect_answers(ray_address)
        return on_a_cluster(config.compute)
    return resolve(config.compute, num_threads)


def expect_enough(config: TrainingConfig, num_train: int) -> None:
    """Raise ConfigError where so many training images are too few for the parts of a batch."""
    for number, phase in enumerate(config.all_phases, 1):
        expect_parts(config.compute, phase.fit.batch_size, num_train, f"{config.place(number)}.fit")


def expect_valid(config: TrainingConfig, share_or_number: float) -> None:
    """Raise ConfigError where there are no valid images and a phase chooses its epoch by them."""
    for number, phase in enumerate(config.all_phases, 1):
        if phase.head is None and not share_or_number:
            raise ConfigError(
                f"{config.place(number)}: the epoch of a fit is chosen on valid images, and there are none; raise "
                f"splitting.valid_share above 0, or compute the head in one step (trains: head, head: auto)"
            )


def expect_same_network(config: TrainingConfig, champion: Checkpoint, told: str) -> None:
    """Raise ConfigError where the section's network or task is another than that of the checkpoint that it begins from."""
    if champion.optimised is not None and champion.optimised.shapes:
        passes = ", ".join(each.name for each in champion.optimised.passes)
        raise ConfigError(
            f"training.weights: a warm start goes on with the whole network of the recipe, and {told}, is one that passes "
            f"took channels from ({passes}); train from other weights, and let the recipe's own passes make it smaller"
        )
    known, named = champion.backbone_settings, config.backbone_settings
    # A default that only one of them writes out makes no difference; a task's settings are about training.
    same = (champion.backbone, champion.task) == (config.backbone, config.task) and (
        plugins.load("backbones", config.backbone, dict(known)).model_dump()
        == plugins.load("backbones", config.backbone, dict(named)).model_dump()
    )
    if not same:
        raise ConfigError(
            f"training.backbone: a warm start goes on with the same network and task, and {told}, has the backbone "
            f"{champion.backbone!r} with the settings {dict(known)} and the task {champion.task!r}; say the same, or train "
            f"from other weights"
        )


def check_blocks(config: TrainingConfig, phase: Phase, last: int, place: str) -> None:
    """Raise ConfigError where the last blocks are not known, are all of them, or take what cannot be augmented."""
    import torch
    from torch import nn

    from components.checkpoints import blocks

    backbone: Backbone = plugins.load("backbones", config.backbone, dict(config.backbone_settings))
    with torch.random.fork_rng(devices=[]):
        found = blocks(config.backbone, backbone, backbone.build())
    if last >= len(found):
        raise ConfigError(
            f"{place}.trains: the backbone {config.backbone!r} has {counted(len(found), 'block')}; name fewer than that, "
            f"or all to train everything"
        )
    if not phase.needing_space:
        return
    contract = backbone.preprocessing
    with torch.inference_mode():
        pictures = torch.zeros(1, contract.channels, contract.height, contract.width)
        shape = tuple(nn.Sequential(*found[:-last]).eval()(pictures).shape[1:])
    if not _is_map(shape, contract.height / contract.width):
        raise ConfigError(
            f"{place}: {phase.needing_space[0]} cuts pieces out of maps (channels, height, width), and what lies below "
            f"{phase.part} of the backbone {config.backbone!r} is of shape {shape}; use mixup in its place, or trains: all, "
            f"where it is given pictures"
        )


def _is_map(shape: tuple[int, ...], aspect: float) -> bool:
    """Whether an array is (channels, height, width): its last two sides are to each other as those of the picture are.

    Tokens lie in one row, and some networks keep their maps as (height, width, channels).
    """
    if len(shape) != 3:
        return False
    first, last = (abs(math.log(shape[i] / shape[i + 1] / aspect)) for i in (0, 1))
    return last <= first


def train(
    splits: Stored[Splits],
    data: Path,
    config: TrainingConfig,
    *,
    out: Path,
    cache: Path,
    root: Path,
    num_threads: int = 2,
    sink: MetricSink | None = None,
    progress: Progress = silent,
    champion: Stored[Checkpoint] | None = None,
    renamed: Renames = (),
    teacher: Stored[Checkpoint] | None = None,
    teacher_renamed: Renames = (),
    plugin_folder: Path | None = None,
    ray_address: RayAddress = NO_CLUSTER,
) -> Checkpoint:
    """Fit the phases on train, choose each one's epoch and the temperature on valid; calibration and test are not read.

    A head that is computed takes no epochs, and its temperature is fitted on train images that are left out in turns, too.

    `champion` is what `weights: champion` goes on from, and `renamed` the classes that got other names since it was
    trained; `teacher` and `teacher_renamed` are the same of the section's teacher. Writes weights.safetensors and
    history.json, whose rows say their phase where there are several. What a killed run left in `out` is taken up, bit for
    bit. Where the section says so, several processes do it, which load a workspace's own plug-ins from `plugin_folder`; with
    the launcher `ray` they are on the cluster at `ray_address`.
    """
    import torch

    check(config, root)
    compute = on_this_machine(config, num_threads, ray_address)
    expect_enough(config, splits.record.counts["train"])
    expect_valid(config, splits.record.counts["valid"])
    sink = sink or NullSink()
    if config.compute.launcher != "local":
        request = {
            "config": config.to_json(),
            "splits": _reference(splits),
            "data": str(data),
            "out": str(out),
            "cache": str(cache),
            "cache_bytes": segments.limit_of(cache),
            "root": str(root),
            "num_threads": num_threads,
            "champion": _reference(champion) if champion else None,
            "renamed": renamed,
            "teacher": _reference(teacher) if teacher else None,
            "teacher_renamed": teacher_renamed,
            "plugins": str(plugin_folder) if plugin_folder else None,
        }
        return Checkpoint.read(_launched(config.compute, request, ray_address, sink, progress))
    torch.set_num_threads(num_threads)
    places: dict[str, Any] = {"out": out, "cache": cache, "root": root, "num_threads": num_threads}
    given: dict[str, Any] = {
        "champion": champion,
        "renamed": renamed,
        "teacher": teacher,
        "teacher_renamed": teacher_renamed,
    }
    trained = train_here(splits, data, config, compute, **places, sink=sink, progress=progress, **given)
    assert trained is not None
    return trained


def _launched(
    config: ComputeConfig, request: dict[str, Any], ray_address: RayAddress, sink: MetricSink, progress: Progress
) -> dict[str, Any]:
    """What the first of several processes answers to a request."""
    if config.launcher == "torchrun":
        command = functools.partial(launching.torchrun, config.processes, WORKER)
        return launching.launch(command, request, sink=sink, progress=progress)
    with ray_cluster.shared_folder(Path(request["cache"])) as shared:
        asked = {
            **request,
            **shared,
            "ray_address": ray_address.head,
            "versions": ray_cluster.versions(),
            "processes": config.processes,
            "cpus": max(1, request["num_threads"] // config.processes),
            "gpus": int(config.device == "cuda"),
        }
        return launching.launch(ray_cluster.command, asked, sink=sink, progress=progress)


def _reference(stored: Stored[Any]) -> dict[str, Any]:
    return {"record": stored.record.to_json(), "folder": str(stored.folder)}


WORKER = "components.training_worker"
"""The module that is each of several processes."""


def train_here(
    splits: Stored[Splits],
    data: Path,
    config: TrainingConfig,
    compute: Compute,
    *,
    out: Path,
    cache: Path,
    root: Path,
    num_threads: int,
    sink: MetricSink,
    progress: Progress,
    champion: Stored[Checkpoint] | None,
    renamed: Renames,
    teacher: Stored[Checkpoint] | None,
    teacher_renamed: Renames,
) -> Checkpoint | None:
    """Do what `train` says, as one of the processes that `compute` says; None in all but the first, which alone writes.

    What is frozen is computed on `num_threads` by the first, while the others wait.
    """
    from components.checkpoints import save_weights

    first = compute.rank == 0
    backbone: Backbone = plugins.load("backbones", config.backbone, dict(config.backbone_settings))
    task: Task = plugins.load("tasks", config.task, dict(config.task_settings))
    classes = task.classes(splits.record.classes)
    with first_alone(compute):
        model, weights_digest = initial(config, classes, cache=cache, root=root, champion=champion, renamed=renamed)
    teaching = _teaching(config, teacher, teacher_renamed, classes)
    data_of_phases = PhaseData(splits, data, task, config, backbone, cache, num_threads, progress, teaching)
    begun_from = [weights_digest, *([teacher.record.digest(), teacher_renamed] if teacher and teaching else [])]
    history: list[dict[str, float]] = []
    for number, phase in enumerate(config.all_phases, 1):
        with first_alone(compute):
            part, (train_set, valid_set) = data_of_phases.of(phase, model)
        told = [config.to_json(), *begun_from, splits.record.digest(), number]
        # What a GPU began is not gone on with by a processor.
        identity = sha256_text(canonical_json([*told, "cuda"] if compute.on_gpu else told))
        numbered = functools.partial(_numbered, before=len(history), phase=number if len(config.all_phases) > 1 else None)
        label = f"phase {number}, " if len(config.all_phases) > 1 else ""
        if phase.head is not None:
            result, answers, labels = _computed(phase, part, task, train_set, valid_set)
            row = numbered(result.history[0])
            sink.log(int(row["epoch"]), row)
            progress(1, 1, f"{label}{phase.part}: {_told(row, task.headline)}")
            best_epoch = len(history) + 1
            history.append(row)
            continue
        # A phase that a killed run had finished is taken up from its checkpoint without a step.
        result = fit_phase(
            phase,
            part,
            task,
            train_set,
            valid_set,
            len(classes),
            groups=parameter_groups(config, backbone, phase, part),
            checkpointing=Checkpointing(out, identity, number, writes=first),
            hooks=(MetricLogging(sink, numbered), ProgressReporting(progress, task.headline, label)),
            setting=f"{config.place(number)}.fit",
            compute=compute,
            teaching=teaching,
        )
        asked, size = logits_of(phase), phase.fit.batch_size
        answers = predict(part, asked, valid_set.inputs, size, compute).numpy()
        labels = valid_set.targets.numpy()
        if len(config.all_phases) > 1:
            result.history[result.best_epoch - 1] |= _on_train(part, asked, train_set, task, size, compute)
        best_epoch = len(history) + result.best_epoch
        history += map(numbered, result.history)
    if not first:
        return None
    temperature = task.fit_temperature(answers, labels)
    measured = task.metrics(answers, labels, temperature)
    write_history(history, out / "history.json")
    weights = save_weights(model.state_dict(), out=out)
    return Checkpoint(
        splits_digest=splits.record.digest(),
        task=config.task,
        task_settings=config.task_settings,
        backbone=config.backbone,
        backbone_settings=config.backbone_settings,
        preprocessing=backbone.preprocessing,
        classes=classes,
        embedding_dim=backbone.embedding_dim,
        weights=weights,
        history=describe(out / "history.json", within=out),
        temperature=temperature,
        best_epoch=best_epoch,
        epochs=len(history),
        valid_metrics={name: estimate.value for name, estimate in measured.items()},
        computed_on=compute.told,
    )


def _computed(
    phase: Phase, part: nn.Module, task: Task, train: Examples, valid: Examples
) -> tuple[FitResult, npt.NDArray[Any], npt.NDArray[Any]]:
    """Compute the head and put it into `part`; returns its one row, and answers with labels that tell how sure it may be.

    These are the answers about train pictures that were left out, and about valid. Where there are none, since every class
    has one picture and none is valid, those about the pictures that it was computed from have to do.
    """
    import torch

    assert phase.head is not None
    assert isinstance(train.inputs, Kept)  # what is frozen comes from a cache
    views, labels = train.inputs.views(), train.targets.numpy()
    head = compute_head(views, labels, phase.head, task)
    head.put_into(part)
    part.eval()
    own = head.logits(views[0])
    on_valid = predict(part, logits_of(phase), valid.inputs, _MOST_TRAIN_IMAGES).numpy()
    told = [(head.answers, labels[head.left_out]), (on_valid, valid.targets.numpy())]
    row = {"epoch": 1.0, "train_loss": float(task.loss(torch.from_numpy(own), train.targets))}
    row |= {"left_out": float(len(head.left_out)), "ridge_strength": head.strength}
    for name, (answers, targets) in zip(("left_out", "valid"), told, strict=True):
        if len(targets):
            row[f"{name}_loss"] = float(task.loss(torch.from_numpy(answers), torch.from_numpy(targets)))
            row[f"{name}_{task.headline}"] = float(task.right(answers, targets).mean())
    if not any(len(targets) for _, targets in told):
        told = [(own, labels)]
    answers, targets = (np.concatenate(each) for each in zip(*told, strict=True))
    return FitResult({}, 1, [row]), answers, targets


def _told(row: dict[str, float], headline: str) -> str:
    """What a head that was computed came to, in words."""
    how = "class means" if row["ridge_strength"] == 0 else f"ridge regression of strength {row['ridge_strength']:g}"
    known = f"left_out_{headline}"
    return how + (f", left-out {headline} {row[known]:.4f}" if known in row else "")


def _teaching(
    config: TrainingConfig, teacher: Stored[Checkpoint] | None, renamed: Renames, classes: tuple[str, ...]
) -> Teaching | None:
    if config.teacher is None:
        return None
    if teacher is None:
        raise ConfigError("training.teacher: no teacher was given to learn from")
    return Teaching.of(config.teacher, teacher, renamed, classes, config.task)


def initial(
    config: TrainingConfig,
    classes: tuple[str, ...],
    *,
    cache: Path,
    root: Path,
    champion: Stored[Checkpoint] | None = None,
    renamed: Renames = (),
) -> tuple[ImageModel, str]:
    """The network before its first phase, and what is to be known of its weights beyond their name.

    Raises ConfigError, WeightsUnavailable.
    """
    import torch

    from components.checkpoints import assemble

    backbone: Backbone = plugins.load("backbones", config.backbone, dict(config.backbone_settings))
    task: Task = plugins.load("tasks", config.task, dict(config.task_settings))
    with torch.random.fork_rng():
        torch.manual_seed(config.all_phases[0].fit.seed)
        model = assemble(backbone, task, len(classes))
    if config.weights == CHAMPION:
        return model, _go_on_from(champion, model, backbone, classes, renamed)
    return model, _put_weights(config, model, backbone, cache=cache, root=root)


def _put_weights(
    config: TrainingConfig,
    model: ImageModel,
    backbone: Backbone,
    *,
    cache: Path,
    root: Path,
) -> str:
    """Put the weights that the section names into the network; returns what is to be known of them beyond their name."""
    from components.checkpoints import load_state

    if config.weights == "random":
        return ""
    local = local_weights(config, root)
    given = from_safetensors(local) if local else backbone.pretrained(config.weights, cache=cache)
    # The head of a checkpoint answers about classes of its own.
    given = {name.removeprefix("backbone."): value for name, value in given.items() if _is_of_checkpoint(name)} or given
    try:
        load_state(model.backbone, given, f"{config.weights} does not fit backbone {config.backbone!r}")
    except CheckpointMismatch as error:
        raise WeightsUnavailable(str(error)) from None
    return sha256_file(local) if local else ""


def _go_on_from(
    champion: Stored[Checkpoint] | None,
    model: ImageModel,
    backbone: Backbone,
    classes: tuple[str, ...],
    renamed: Renames,
) -> str:
    """Put the champion's weights into the network, each answer where its class is now; returns what they are."""
    from components.checkpoints import load_state, reorder_answers

    if champion is None:
        raise ConfigError("training.weights: champion: no champion was given to go on from")
    known = names_after(champion.record.classes, renamed)
    if set(known) != set(classes):
        raise ConfigError(
            f"training.weights: champion: the champion answers about other classes than the data have "
            f"({differing(known, classes)}); train from other weights, such as "
            f"{', '.join(backbone.weights_choices) or 'random'}. A class that only gets another name gets it by "
            f"`visionloop data rename-class`"
        )
    state = from_safetensors(champion.folder / champion.record.weights.name)
    load_state(model, state, "the champion's weights do not fit the network of this recipe")
    if known != classes:
        reorder_answers(model.head, [known.index(name) for name in classes])
    return f"{champion.record.weights.sha256} of {', '.join(known)}" if renamed else champion.record.weights.sha256


def part_of(config: TrainingConfig, backbone: Backbone, phase: Phase, model: ImageModel) -> tuple[nn.Module, int]:
    """The part of the network that a phase trains, and how many blocks of the backbone are in it above a frozen rest."""
    from torch import nn

    from components.checkpoints import blocks

    if phase.trains == "head":
        return model.head, 0
    if isinstance(phase.trains, LastBlocks):
        found = blocks(config.backbone, backbone, model.backbone)
        return nn.Sequential(*found[-phase.trains.last :], model.head), phase.trains.last
    return model, 0


def parameter_groups(config: TrainingConfig, backbone: Backbone, phase: Phase, part: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of each block and of the head, first to last, where their rates differ."""
    from torch import nn

    from components.checkpoints import blocks

    if phase.fit.layer_decay == 1:
        return []
    members = list(part) if isinstance(part, nn.Sequential) else [part]
    if phase.trains == "all":
        whole = part.get_submodule("backbone")
        members = [*blocks(config.backbone, backbone, whole), part.get_submodule("head")]
    return [list(member.parameters()) for member in members]


def fit_phase(
    phase: Phase,
    part: nn.Module,
    task: Task,
    train: Examples,
    valid: Examples,
    num_classes: int,
    *,
    groups: Sequence[Sequence[nn.Parameter]],
    checkpointing: Checkpointing,
    hooks: Sequence[Hook],
    setting: str,
    compute: Compute | None = None,
    teaching: Teaching | None = None,
) -> FitResult:
    """Fit the part that a phase trains as the phase says; see `components.fitting.fit`.

    Where there is `teaching`, `train` are the examples that it made.
    """
    import torch

    device = (compute or Compute()).device
    counts = torch.bincount(train.targets, minlength=num_classes).to(device) if phase.loss is not None else torch.zeros(0)
    loss = phase.loss_on(counts)
    if teaching is not None:
        loss = teaching.loss(loss or task.loss, mixed=phase.mixes)
    return fit(
        part,
        logits_of(phase),
        task,
        train,
        valid,
        phase.fit,
        augment=phase.changer() if phase.trains == "all" else None,
        mix=phase.mixer(num_classes, channels_last=phase.trains == "all"),
        loss=loss,
        sampling=phase.sampling,
        frozen=phase.kept(part),
        groups=groups,
        checkpointing=checkpointing,
        hooks=hooks,
        setting=setting,
        compute=compute,
    )


def _numbered(row: dict[str, float], *, before: int, phase: int | None) -> dict[str, float]:
    """A row of a phase's history as a row of the training's: epochs are numbered through."""
    found = {**row, "epoch": before + row["epoch"]}
    return found if phase is None else {**found, "phase": float(phase)}


_MOST_TRAIN_IMAGES = 1000
"""Of so many images of the train split it is asked how many a phase has learned."""


def _on_train(
    part: nn.Module, asked: LogitsOf, train: Examples, task: Task, batch_size: int, compute: Compute
) -> dict[str, float]:
    """The share of training images, as they are, that a phase's best epoch answers right, and of how many."""
    import torch

    rows = torch.linspace(0, len(train.targets) - 1, min(len(train.targets), _MOST_TRAIN_IMAGES)).long()
    logits = torch.cat(
        [
            predict(part, asked, InMemory(train.inputs.take(some, None)), batch_size, compute)
            for some in torch.split(rows, batch_size)
        ]
    )
    right = task.right(logits.numpy(), train.targets[rows].numpy())
    return {f"train_{task.headline}": float(right.mean()), "train_images": float(len(rows))}


def logits_of(phase: Phase) -> LogitsOf:
    """What the part that a phase trains is asked by. Pictures come with their channels side by side already."""
    return _logits if phase.trains == "all" else _logits_of_maps


def _logits_of_maps(module: torch.nn.Module, maps: torch.Tensor) -> torch.Tensor:
    """Of blocks with a head; convolutions over channels that lie side by side take a quarter less time."""
    import torch

    layout = torch.channels_last if maps.ndim == 4 else torch.contiguous_format
    return _logits(module, maps.to(torch.float32, memory_format=layout))


def _logits(module: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Of a head, of blocks with a head, or of the whole network, which answers with its embedding too."""
    import torch

    answer = module(inputs.float() if inputs.dtype == torch.float16 else inputs)
    logits: torch.Tensor = answer[0] if isinstance(answer, tuple) else answer
    return logits


@dataclass(frozen=True)
class PhaseData:
    """What each phase trains on: what lies below the part that trains, as the network is by then, computed and cached."""

    splits: Stored[Splits]
    folder: Path
    task: Task
    config: TrainingConfig
    backbone: Backbone
    cache: Path
    num_threads: int
    progress: Progress
    teaching: Teaching | None

    def of(self, phase: Phase, model: ImageModel) -> tuple[nn.Module, tuple[Examples, Examples]]:
        """The part that trains, and the train and the valid split as it takes them."""
        part, num_blocks = part_of(self.config, self.backbone, phase, model)
        return part, (self._examples("train", phase, model, num_blocks), self._examples("valid", phase, model, num_blocks))

    def _examples(self, name: SplitName, phase: Phase, model: ImageModel, num_blocks: int) -> Examples:
        import torch

        table = rows(self.splits, name)
        pictures, paths = list(table["picture"]), [self.folder / path for path in table["path"]]
        targets = self.task.targets(list(table["label"]), self.task.classes(self.splits.record.classes))
        state = model.backbone.state_dict()
        # Nobody is answered with a changed picture: what is measured on valid is the first view.
        views = phase.cached_views() if name == "train" else [AS_IT_IS]
        # Told as a note of the progress: a full disk makes the run slow, and no more than that.
        told: dict[str, Any] = {"progress": self.progress, "say": functools.partial(self.progress, 0, 1)}
        inputs: Inputs
        if phase.trains == "all":
            inputs = prepared(pictures, paths, self.backbone.preprocessing, cache=self.cache, **told)
        else:
            frozen = Frozen(self.config.backbone, self.backbone, state, num_blocks, model.embedding_dim)
            inputs = maps(pictures, paths, frozen, views, cache=self.cache, num_threads=self.num_threads, **told)
        examples = Examples(inputs, torch.from_numpy(targets))
        if self.teaching is None or name != "train":
            return examples
        # Where everything trains there is the one view: pictures are changed anew in every epoch, and what the teacher says
        # of them as they are stands for that.
        return self.teaching.examples(
            examples, pictures, paths, views, cache=self.cache, num_threads=self.num_threads, **told
        )
