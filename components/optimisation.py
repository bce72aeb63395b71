"""Optimisation: Checkpoint -> Checkpoint, smaller or faster. Passes, one after the other, with fine-tuning in between.

It is there only in a run whose recipe names a pass. What a pass makes is fine-tuned by training's own phases, on the same
train split, and looked at on valid alone: what it costs on test is judged by the gates, as of every candidate.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from components import phases as phase_checks
from components import plugins
from components.calibration import stratified
from components.compute import Compute, expect_parts, resolve
from components.contracts.data import Splits
from components.contracts.errors import CheckpointMismatch, ConfigError, PassFailed, VisionloopError, in_short
from components.contracts.families import Backbone, Pass, PassRequest, Task
from components.contracts.models import AppliedPass, Checkpoint, NetworkSize, Optimised, Precision
from components.contracts.progress import Progress, silent
from components.contracts.records import Record, Stored, canonical_json, sha256_text
from components.contracts.verdicts import Estimate
from components.fitting import Examples, FittingConfig, predict, write_history
from components.hooks import Checkpointing, ProgressReporting
from components.intervals import paired_counts, paired_difference
from components.phases import LastBlocks, Phase
from components.samples import rows
from components.store import describe
from components.training import (
    PhaseData,
    TrainingConfig,
    check_blocks,
    fit_phase,
    logits_of,
    parameter_groups,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from components.checkpoints import ImageModel

HISTORY = "fine-tuning.json"
_BATCH = 16
"""Of the images that a pass looks at."""


class ChosenPass(Record):
    """A pass, its settings, and how the network is fine-tuned after each of its steps."""

    pass_: str = Field(alias="pass")
    settings: dict[str, Any] = {}
    phases: tuple[Phase, ...] = ()
    """Of each fine-tuning, as those of a training; none for everything, on the augmentations and the loss of the
    training's last phase, for three epochs.
    """

    @model_serializer(mode="wrap")
    def _as_said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {{"pass_": "pass"}.get(key, key): value for key, value in handler(self).items()}

    def load(self) -> Pass:
        found: Pass = plugins.load("passes", self.pass_, dict(self.settings))
        return found

    @property
    def only_for(self) -> Precision | None:
        """The one precision whose engines have a use for it; None where all have."""
        return getattr(self.load(), "only_for", None)


class OptimisationConfig(Record):
    """Which passes make the trained network smaller or faster."""

    passes: tuple[ChosenPass, ...] = ()
    """In this order."""
    compare: bool = True
    """Whether the network as it was trained is exported and asked about the test images too, so that approvers see what the
    passes cost, class by class, and what they bought in milliseconds. That takes as long as one more engine: in int8 where
    a pass is for int8 alone, else in fp32.
    """

    @model_validator(mode="after")
    def _of_passes(self) -> Self:
        if not self.passes and not self.compare:
            raise ValueError("compare has no effect without passes; name one, such as {pass: prune}, or remove it")
        return self

    @property
    def compared_in(self) -> Precision:
        """What a pass for int8 did is not seen in fp32, and what the others did is seen in int8 as well."""
        return next((chosen.only_for for chosen in self.passes if chosen.only_for), "fp32")


def fine_tuning(chosen: ChosenPass, training: TrainingConfig) -> tuple[Phase, ...]:
    """The phases after each step of a pass, however they were said.

    Where nothing was: everything trains, since what was frozen has lost channels too, at a rate that suits weights which
    have learned already, on what the training's last phase made of images and labels.
    """
    if chosen.phases:
        return chosen.phases
    last = training.all_phases[-1]
    fit = FittingConfig(
        epochs=3,
        patience=3,
        batch_size=last.fit.batch_size,
        learning_rate=min(3e-4, last.fit.learning_rate),
        weight_decay=last.fit.weight_decay,
        warmup_epochs=0.3,
        seed=last.fit.seed,
        checkpoint_every_s=last.fit.checkpoint_every_s,
    )
    kept = {name: getattr(last, name) for name in ("augmentation", "augmentations", "loss", "sampling")}
    statistics: Any = "frozen" if getattr(chosen.load(), "keeps_batch_norm", False) else None
    return (Phase(trains="all", fit=fit, batch_norm=statistics, **kept),)


def check(config: OptimisationConfig, training: TrainingConfig) -> None:
    """Raise ConfigError for a section that cannot work, before any work is done.

    Each pass is tried on the network with random weights, so that what it cannot do is known before a training of hours.
    """
    if config.passes:
        _check(canonical_json(config.to_json()), canonical_json(training.to_json()))


@functools.lru_cache(maxsize=32)
def _check(config_json: str, training_json: str) -> None:
    config = OptimisationConfig.model_validate_json(config_json, strict=True)
    training = TrainingConfig.model_validate_json(training_json, strict=True)
    task: Task = plugins.load("tasks", training.task, dict(training.task_settings))
    for number, chosen in enumerate(config.passes):
        member, place = chosen.load(), _place(number)
        if member.undone_by_training and number + 1 < len(config.passes):
            raise ConfigError(
                f"{place}: the pass {config.passes[number + 1].pass_!r} after {chosen.pass_!r} would undo "
                f"{member.undone_by_training}; let {chosen.pass_!r} be the last one"
            )
        for index, phase in enumerate(fine_tuning(chosen, training)):
            of_phase = f"{place}.phases.{index}"
            phase_checks.check(phase, of_phase, task)
            if phase.head is not None:
                raise ConfigError(f"{of_phase}.head: a head that is computed is no fine-tuning; remove it, and name a fit")
            expect_parts(training.compute, phase.fit.batch_size, phase.fit.batch_size, f"{of_phase}.fit")
            if isinstance(phase.trains, LastBlocks):
                check_blocks(training, phase, phase.trains.last, of_phase)
    _rehearse(config, training, task)


def _rehearse(config: OptimisationConfig, training: TrainingConfig, task: Task) -> None:
    """Let every pass change a network of random weights, shown noise, and rebuild what is left; raises ConfigError."""
    import torch

    from components.checkpoints import assemble, load_state, reshape, shapes_of

    backbone: Backbone = plugins.load("backbones", training.backbone, dict(training.backbone_settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, again = (assemble(backbone, task, 2).eval() for _ in range(2))
    contract = backbone.preprocessing
    shape = (2, contract.height, contract.width, contract.channels)
    noise = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = ("a", "b")
    targets = torch.from_numpy(task.targets(labels, task.classes(labels)))
    names = set(model.state_dict())
    for number, chosen in enumerate(config.passes):
        shown = _Shown(noise[:1], lambda: iter([(noise, targets)]), lambda: iter([noise]), lambda: iter([(noise, targets)]))
        right = np.zeros(len(noise), dtype=bool)
        work = _Work(model, chosen, number, task, _network(training), shown, right, rehearsal=True)
        for step in range(1, work.member.steps + 1):
            work.begin(step)
            frozen = [phase for phase in fine_tuning(chosen, training) if phase.trains != "all"]
            if frozen and set(model.state_dict()) != names:
                raise ConfigError(
                    f"{work.place}.phases: while it is fine-tuned, the pass {chosen.pass_!r} computes with other tensors "
                    f"than the network has, and what is frozen below {frozen[0].part} cannot; use trains: all"
                )
            work.end(step)
    whole, left = shapes_of(again.state_dict()), model.state_dict()

    def rebuilt() -> ImageModel:
        reshape(again, {name: shape for name, shape in shapes_of(left).items() if whole.get(name) != shape})
        load_state(again, left, "what is left does not fit")
        return again

    names_of = [chosen.pass_ for chosen in config.passes]
    if problem := _not_rebuilt(names_of, _network(training), rebuilt, model, noise):
        raise ConfigError(f"optimisation.passes: {problem}. Choose another network or another pass")


def _network(training: TrainingConfig) -> str:
    return f"the backbone {training.backbone!r} {dict(training.backbone_settings)}"


def _place(number: int) -> str:
    return f"optimisation.passes.{number}"


@dataclass(frozen=True)
class _Shown:
    """The images that passes may look at; see `PassRequest`."""

    example: torch.Tensor
    images: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]]
    calibration: Callable[[], Iterator[torch.Tensor]]
    valid: Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]]


@dataclass
class _Work:
    """A pass at work on a network."""

    model: ImageModel
    chosen: ChosenPass
    number: int
    """Of the pass, counted from zero."""
    task: Task
    network: str
    """What is changed, in words."""
    shown: _Shown
    right: npt.NDArray[np.bool_]
    """Which valid images the network before the pass answers rightly."""
    rehearsal: bool = False
    notes: list[str] = field(default_factory=list)
    compared: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)
    done: bool = False
    """Whether the pass wants no fine-tuning of this step."""

    def __post_init__(self) -> None:
        self.member = self.chosen.load()
        self.before = self.size()

    @property
    def place(self) -> str:
        return _place(self.number)

    def size(self) -> NetworkSize:
        from components.network_size import network_size

        return network_size(self.model, self.shown.example)

    def begin(self, step: int) -> bool:
        """Whether the network is to be fine-tuned, and the step to be ended."""
        self.done = False
        self._do(self.member.begin, step)
        return not self.done

    def end(self, step: int) -> None:
        self._do(self.member.end, step)

    def _do(self, what: Callable[[nn.Module, PassRequest], None], step: int) -> None:
        """One half of a step, in evaluation mode, drawing nothing from what is drawn later.

        Raises PassFailed, and in a rehearsal ConfigError, for what leaves no network that answers.
        """
        import torch

        # From the device and the layout in which it was fine-tuned.
        self.model.to("cpu").to(memory_format=torch.contiguous_format).eval()
        request = PassRequest(
            step=step,
            before=self.before,
            task=self.task,
            example=self.shown.example,
            images=self.shown.images,
            calibration=self.shown.calibration,
            valid=self.shown.valid,
            rehearsal=self.rehearsal,
            note=self._note,
            compare=self._compare,
            enough=self._enough,
        )
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(step)
                what(self.model, request)
        except ConfigError as error:
            error.args = (f"{self.place}.settings: {error}",)
            raise
        except (VisionloopError, OSError, MemoryError):
            raise  # of a pass of one's own, of the images, of the machine: no network is at fault
        except Exception as error:
            raise self._failed(f"it cannot change it{self._where()}: {in_short(error)}") from error
        try:
            with torch.no_grad():
                self.model.embedding_dim = int(self.model.eval()(self.shown.example)[1].shape[1])
        except Exception as error:
            raise self._failed(f"it left a network that answers nothing{self._where()}: {in_short(error)}") from error
        odd = [name for name, value in self.model.state_dict().items() if not value.isfinite().all()]
        if odd:
            raise self._failed(f"it left NaN or infinite numbers in {odd[0]}")

    def _failed(self, problem: str) -> VisionloopError:
        told = f"{self.place}: the pass {self.chosen.pass_!r} fails on {self.network}: {problem}"
        advice = "Correct the pass, or leave it out, or choose another network"
        return (
            ConfigError(f"{told}. {advice}") if self.rehearsal else PassFailed(f"{told}; nothing was registered. {advice}")
        )

    def _where(self) -> str:
        failing = _failing(self.model, self.shown.example)
        return f", in which {failing} cannot compute any more" if failing else ""

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _compare(self, name: str, right: npt.NDArray[np.bool_]) -> Estimate:
        self.compared[name] = paired_counts(self.right, right)
        return paired_difference(right, self.right)

    def _enough(self) -> None:
        self.done = True


def _failing(network: nn.Module, example: torch.Tensor) -> str:
    """The innermost layer that cannot compute, and its kind; empty where all can."""
    import torch

    entered: list[str] = []

    def leave(*_: Any) -> None:
        entered.pop()

    hooks = []
    for name, layer in network.named_modules():
        told = f"{name or 'the network'} ({type(layer).__name__})"
        hooks += [
            layer.register_forward_pre_hook(lambda *_, told=told: entered.append(told)),
            layer.register_forward_hook(leave),
        ]
    try:
        with torch.no_grad():
            network.eval()(example)
    except Exception:
        return entered[-1]
    finally:
        for hook in hooks:
            hook.remove()
    return ""


def on_this_machine(training: TrainingConfig) -> Compute:
    """What fine-tunings are computed on, whatever the training is; raises ConfigError where that is not here.

    They are short, and the network is another one after each: one process of this machine does them.
    """
    try:
        return resolve(training.compute.model_copy(update={"launcher": "local", "processes": 1}))
    except ConfigError as error:
        raise ConfigError(f"optimisation.passes are fine-tuned on this machine: {error}") from None


def optimise(
    trained: Stored[Checkpoint],
    splits: Stored[Splits],
    data: Path,
    config: OptimisationConfig,
    training: TrainingConfig,
    *,
    out: Path,
    cache: Path,
    num_threads: int = 2,
    progress: Progress = silent,
) -> Checkpoint:
    """Apply the passes to a trained network; calibration and test are not read.

    Writes weights.safetensors, the history of the training, and fine-tuning.json, a row an epoch. What a killed run left in
    `out` is taken up, bit for bit. Raises ConfigError, PassFailed, TrainingDiverged.
    """
    import torch

    from components.checkpoints import assemble, restore, save_weights, shapes_of

    check(config, training)
    _expect_same(trained.record, training)
    compute = on_this_machine(training)
    torch.set_num_threads(num_threads)
    backbone: Backbone = plugins.load("backbones", training.backbone, dict(training.backbone_settings))
    task: Task = plugins.load("tasks", training.task, dict(training.task_settings))
    classes = trained.record.classes
    model = restore(trained)
    phase_data = PhaseData(splits, data, task, training, backbone, cache, num_threads, progress, None)
    whole = Phase(trains="all")
    _, (train_set, valid_set) = phase_data.of(whole, model)
    if not len(valid_set.targets):
        raise ConfigError(f"{_place(0)}: the epochs of a fine-tuning are chosen on valid images, and there are none")
    targets = valid_set.targets.numpy()

    def answers() -> Any:
        return predict(model, logits_of(whole), valid_set.inputs, _BATCH).numpy()

    stratified_rows = stratified(rows(splits, "train").assign(_row=range(len(train_set.targets))), task)["_row"]
    shown = _Shown(
        example=train_set.inputs.take(torch.arange(1), None),
        # In an order that mixes the classes and stays the same.
        images=functools.partial(
            _batches, train_set, torch.randperm(len(train_set.inputs), generator=torch.Generator().manual_seed(0))
        ),
        calibration=lambda: (some for some, _ in _batches(train_set, torch.tensor(stratified_rows.to_numpy()))),
        valid=functools.partial(_batches, valid_set, torch.arange(len(valid_set.inputs))),
    )
    history: list[dict[str, float]] = []
    applied: list[AppliedPass] = []
    fits = itertools.count(1)
    logits = answers()
    for number, chosen in enumerate(config.passes):
        work = _Work(model, chosen, number, task, _network(training), shown, task.right(logits, targets))
        rows_before = len(history)
        for step in range(1, work.member.steps + 1):
            if not work.begin(step):
                continue
            for index, phase in enumerate(fine_tuning(chosen, training)):
                fit_number = next(fits)
                told = {"pass": float(number + 1), "step": float(step)}
                label = f"{chosen.pass_}, step {step} of {work.member.steps}, "
                part, (train, valid) = phase_data.of(phase, model)
                identity = [
                    config.to_json(),
                    training.to_json(),
                    trained.record.digest(),
                    splits.record.digest(),
                    compute.key,
                ]
                digest = plugins.member_digest("passes", chosen.pass_)
                result = fit_phase(
                    phase,
                    part,
                    task,
                    train,
                    valid,
                    len(classes),
                    groups=parameter_groups(training, backbone, phase, part),
                    checkpointing=Checkpointing(
                        out, sha256_text(canonical_json([*identity, digest, fit_number])), fit_number
                    ),
                    hooks=(ProgressReporting(progress, task.headline, label),),
                    setting=f"{work.place}.phases.{index}.fit",
                    compute=compute,
                )
                history += [{**row, **told, "epoch": len(history) + row["epoch"]} for row in result.history]
            work.end(step)
        logits = answers()
        loss = float(task.loss(torch.from_numpy(logits), valid_set.targets))
        if not torch.isfinite(torch.tensor(loss)):
            raise PassFailed(
                f"{work.place}: after the pass {chosen.pass_!r} the valid loss is {loss}; nothing was registered. Take less "
                f"away, or correct the pass"
            )
        applied.append(
            AppliedPass(
                name=chosen.pass_,
                settings=_all_settings(chosen),
                epochs=len(history) - rows_before,
                before=work.before,
                after=work.size(),
                valid=paired_counts(work.right, task.right(logits, targets)),
                notes=tuple(work.notes),
                compared=work.compared,
            )
        )
    temperature = task.fit_temperature(logits, targets)
    measured = task.metrics(logits, targets, temperature)
    with torch.random.fork_rng(devices=[]):
        built = shapes_of(assemble(backbone, task, len(classes)).state_dict())
    found = shapes_of(model.state_dict())
    write_history(history, out / HISTORY)
    (out / trained.record.history.name).write_bytes((trained.folder / trained.record.history.name).read_bytes())
    record = trained.record.model_copy(
        update={
            "weights": save_weights(model.state_dict(), out=out, pack=True),
            "history": describe(out / trained.record.history.name, within=out),
            "embedding_dim": model.embedding_dim,
            "temperature": temperature,
            "valid_metrics": {name: estimate.value for name, estimate in measured.items()},
            "optimised": Optimised(
                made_of=trained.record.digest(),
                passes=tuple(applied),
                shapes={name: shape for name, shape in found.items() if built.get(name) != shape},
                history=describe(out / HISTORY, within=out),
            ),
        }
    )
    images = valid_set.inputs.take(torch.arange(min(_BATCH, len(valid_set.inputs))), None)
    names = [each.name for each in applied]
    if problem := _not_rebuilt(names, _network(training), lambda: restore(Stored(record, out)), model, images):
        raise PassFailed(f"{problem}; nothing was registered. Choose another network or another pass")
    return record


def _expect_same(checkpoint: Checkpoint, training: TrainingConfig) -> None:
    """Raise CheckpointMismatch for a checkpoint of another task or network than the section's, or one that is optimised."""
    for what, found, expected in (
        ("task", (checkpoint.task, checkpoint.task_settings), (training.task, training.task_settings)),
        ("backbone", (checkpoint.backbone, checkpoint.backbone_settings), (training.backbone, training.backbone_settings)),
    ):
        if found != expected:
            raise CheckpointMismatch(
                f"the passes are to change a checkpoint of the {what} {found[0]!r} {dict(found[1])}, expected "
                f"{expected[0]!r} {dict(expected[1])}, which the recipe trains; train again"
            )
    if checkpoint.optimised is not None:
        passes = ", ".join(each.name for each in checkpoint.optimised.passes)
        raise CheckpointMismatch(f"the checkpoint went through passes already ({passes}); optimise the one it was made of")


def _not_rebuilt(
    passes: Sequence[str], network: str, rebuild: Callable[[], ImageModel], model: ImageModel, images: torch.Tensor
) -> str:
    """Why the network that is rebuilt from its tensors does not answer as the one in memory; empty where it does."""
    import torch

    told = f"what {', '.join(map(repr, passes))} left of {network}"
    with torch.no_grad():
        expected = model.eval()(images)
        try:
            rebuilt = rebuild()(images)
        except Exception as error:
            return f"{told} cannot be rebuilt from the shapes of its tensors: {in_short(error)}"
    # Of random weights a number may be none.
    same = all(
        ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True)
        for ours, theirs in zip(rebuilt, expected, strict=True)
    )
    return "" if same else f"{told} answers otherwise when it is rebuilt from its tensors"


def _all_settings(chosen: ChosenPass) -> dict[str, Any]:
    """Defaults included."""
    found: dict[str, Any] = plugins.load("passes", chosen.pass_, dict(chosen.settings)).model_dump(mode="json")
    return found


def _batches(examples: Examples, order: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The images of these rows as they are, with their targets."""
    import torch

    for some in torch.split(order, _BATCH):
        yield examples.inputs.take(some, None), examples.targets[some]
