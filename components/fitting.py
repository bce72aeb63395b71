"""The fit loop that training and optimisation share: optimisers, schedules, faults, and hooks for everything else.

Everything random is drawn from (seed, epoch, step), and the schedule is a function of the step, so the whole state of a
run is its tensors and a few numbers. A fit that diverges or runs out of memory goes back to the start of the epoch, and on
from there at half the rate or in smaller parts; every checkpoint holds the state there, too. A run that is killed at any
moment and started again ends in the same bits as one that was not, on the same machine with the same number of threads.
Nothing is pickled: see infra/decisions/0003.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, cast

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from components import collectives, memory
from components.compute import PLACE, Compute, compiling, device_of, to_device
from components.contracts.errors import ConfigError, TrainingDiverged
from components.contracts.families import Task
from components.contracts.records import Record
from components.contracts.wording import counted
from components.hooks import Checkpointing, EarlyStopping, Fitting, Hook, MovingAverage, Recovery, capture
from components.store import write_atomically

if TYPE_CHECKING:
    import torch
    from torch import nn


class FittingConfig(Record):
    """Optimiser and schedule of one fit.

    As JSON, keys that came later are left out at their defaults, so that what an older recipe makes keeps its digest.
    """

    epochs: int = Field(default=30, ge=1, le=10_000)
    batch_size: int = Field(default=64, ge=1, le=65_536)
    """The last batch of an epoch is what is left, so one that is larger than the data is all of it.

    A single picture that is left joins the batch before it where batch normalisation trains, which needs two.
    """
    learning_rate: float = Field(default=1e-3, gt=0, le=1e30)
    """The highest that the schedule reaches."""
    weight_decay: float = Field(default=1e-2, ge=0, le=1e6)
    """The optimiser's, on weights of two or more dimensions only."""
    warmup_epochs: float = Field(default=1.0, ge=0)
    """The rate rises in a line for so long; `one_cycle` and `cyclical` have a rise of their own."""
    patience: int = Field(default=10, ge=1)
    """Epochs without a lower valid loss before the fit stops."""
    checkpoint_every_s: float = Field(default=30.0, ge=0)
    """A checkpoint is written at the end of an epoch or step when the last one is older than this."""
    seed: int = Field(default=0, ge=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    schedule: Literal["cosine", "constant", "step", "one_cycle", "cyclical"] = "cosine"
    """`cosine` falls to zero; `step` is multiplied by `step_factor` every `step_epochs`; `one_cycle` (Smith 2018) rises from
    a 25th for 30 % of the fit and falls to a 250,000th; `cyclical` (Smith 2017) rises from a quarter and falls back, in
    `cycle_epochs`.
    """
    step_epochs: int = Field(default=10, ge=1)
    step_factor: float = Field(default=0.1, gt=0, le=1)
    cycle_epochs: int = Field(default=4, ge=1)
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """The rate of each block of the network, of that of the block after it."""
    clip_norm: float = Field(default=0.0, ge=0)
    """The longest that the gradient of all parameters may be; 0 for any."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Share of the old mean in a moving mean of the weights, which is measured and kept in their place; 0 for none.

    After n steps it is (1 + n) / (10 + n) at most, so that short fits forget the weights they began with.
    """

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov looks ahead along the momentum, and momentum is 0; raise momentum or remove nesterov")
        for key, (other, needed) in _NEEDS.items():
            value = getattr(self, other)
            if getattr(self, key) != type(self).model_fields[key].default and value not in needed:
                raise ValueError(
                    f"{key} has an effect with {other}: {' or '.join(needed)}, not with {value}; remove one of them"
                )
        return self

    @model_serializer(mode="wrap")
    def _as_ever(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {key: value for key, value in handler(self).items() if key not in _LATER or value != fields[key].default}

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from the first of the fit."""
        steps = self.epochs * steps_per_epoch
        if self.schedule == "one_cycle":
            top = max(0.3 * steps - 1, 0.0)
            first, last = self.learning_rate / 25, self.learning_rate / 250_000
            if step < top:
                return _cosine(first, self.learning_rate, step / top)
            return _cosine(self.learning_rate, last, (step - top) / max(1.0, steps - 1 - top))
        if self.schedule == "cyclical":
            place = step / (self.cycle_epochs * steps_per_epoch) % 1
            return self.learning_rate * (0.25 + 0.75 * (1 - abs(2 * place - 1)))
        warmup = self.warmup_epochs * steps_per_epoch
        rise = (step + 1) / (warmup + 1) if step < warmup else 1.0
        if self.schedule == "constant":
            return self.learning_rate * rise
        if self.schedule == "step":
            return self.learning_rate * rise * self.step_factor ** (step // (self.step_epochs * steps_per_epoch))
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        return _cosine(self.learning_rate, 0.0, min(1.0, (step - warmup) / max(1.0, steps - warmup)))


_LATER = (
    "optimizer",
    "momentum",
    "nesterov",
    "schedule",
    "step_epochs",
    "step_factor",
    "cycle_epochs",
    "layer_decay",
    "clip_norm",
    "ema_decay",
)
_NEEDS = {
    "momentum": ("optimizer", ("sgd",)),
    "nesterov": ("optimizer", ("sgd",)),
    "warmup_epochs": ("schedule", ("cosine", "constant", "step")),
    "step_epochs": ("schedule", ("step",)),
    "step_factor": ("schedule", ("step",)),
    "cycle_epochs": ("schedule", ("cyclical",)),
}
"""A key that does nothing beside another value of the other key."""


def _cosine(first: float, last: float, share: float) -> float:
    """From the first value to the last along half a cosine."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))


class Inputs(Protocol):
    """What a network is fitted on, n rows of any shape, in memory or not; a row may have several views."""

    def __len__(self) -> int: ...

    def take(self, rows: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """The chosen rows (m, ...): one view each that the generator draws, or the first view where there is none."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Inputs of one view: a tensor (n, ...)."""

    tensor: torch.Tensor

    def __len__(self) -> int:
        return len(self.tensor)

    def take(self, rows: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        return self.tensor[rows]


class Examples:
    """Inputs (n, ...) and the task's targets (n, ...); a tensor of inputs is taken as it is."""

    def __init__(self, inputs: Inputs | torch.Tensor, targets: torch.Tensor) -> None:
        import torch

        self.inputs: Inputs = InMemory(inputs) if isinstance(inputs, torch.Tensor) else inputs
        self.targets = targets

    def take(self, rows: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (m, ...) and targets (m, ...) of the chosen rows, as a step takes them."""
        return self.inputs.take(rows, generator), self.targets[rows]


@dataclass(frozen=True)
class FitResult:
    """The best epoch's weights and what every epoch measured."""

    best: dict[str, torch.Tensor]
    best_epoch: int
    history: list[dict[str, float]]


LogitsOf = Callable[["nn.Module", "torch.Tensor"], "torch.Tensor"]
Augment = Callable[["torch.Tensor", "torch.Generator"], "torch.Tensor"]
Mix = Callable[["torch.Tensor", "torch.Tensor", "torch.Generator"], tuple["torch.Tensor", "torch.Tensor"]]
"""Inputs and targets of a batch to mixed inputs and shares of classes."""
LossFunction = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""Logits and targets of a batch to their mean loss."""
Sampling = Literal["shuffled", "balanced"]


def fit(
    model: nn.Module,
    logits_of: LogitsOf,
    task: Task,
    train: Examples,
    valid: Examples,
    config: FittingConfig,
    *,
    checkpointing: Checkpointing,
    augment: Augment | None = None,
    mix: Mix | None = None,
    loss: LossFunction | None = None,
    sampling: Sampling = "shuffled",
    frozen: Sequence[nn.Module] = (),
    groups: Sequence[Sequence[nn.Parameter]] = (),
    hooks: Sequence[Hook] = (),
    setting: str = "training.fit",
    compute: Compute | None = None,
) -> FitResult:
    """Fit `model` in place to its best epoch; `setting` is where a recipe keeps `config`, and errors name it.

    It lies on the device of `compute` from then on. Examples stay where they are, batches go there as they are taken.

    Steps make `loss` smaller (the task's where none is given) on inputs that `augment` and then `mix` changed; the valid
    loss is always the task's, so that fits can be compared. An epoch takes every example once, or with `balanced` sampling
    as many draws as there are examples, of every class equally often. `frozen` modules stay in evaluation mode and keep
    their parameters. `groups` are the parameters of the network's blocks, first to last, for `layer_decay`; what is in none
    of them goes with the last.

    Where the loss or the gradient is not finite, the epoch begins anew at half the rate, twice in a fit at most; where
    memory is not enough, it begins anew with every batch computed in twice as many parts, of two examples at least. Batch
    normalisation then sees the parts one by one.
    Raises TrainingDiverged, ConfigError, CheckpointMismatch, TamperedArtefact.
    """
    compute = compute or Compute()
    best = EarlyStopping(config.patience)
    average = MovingAverage(config.ema_decay)
    # What is saved is what all the others have made of the step.
    hooks = (*([average] if config.ema_decay else []), best, *hooks, checkpointing)
    with _deterministic(compute), _still(frozen), memory.reused():
        _place(model, compute)
        optimizer = _optimizer(model, groups, config, setting)
        _training_mode(model, frozen)
        ends = _ends(len(train.targets), config.batch_size, at_least=2 if _normalises(model) else 1)
        parts = compute.accumulate
        fitting = Fitting(
            model, optimizer, config, len(ends), hooks, accumulate=parts, micro_batches=parts, scaler=compute.scaler()
        )
        steps = collectives.together(_steps_of(model, compute), compute)
        stepping = _Stepping(steps, logits_of, loss or task.loss, train, augment, mix, setting, compute)
        for hook in hooks:
            hook.on_start(fitting)
        collectives.meet(compute)  # no checkpoint is written before all have read the last one
        while fitting.epoch < config.epochs and not fitting.stopped:
            if fitting.step == 0:
                fitting.start = capture(fitting)
            recovery: Recovery | None = None
            try:
                order = _order(train.targets, sampling, _generator(config.seed, fitting.epoch))
                _training_mode(model, frozen)
                while fitting.step < fitting.steps_per_epoch:
                    chosen = order[ends[fitting.step - 1] if fitting.step else 0 : ends[fitting.step]]
                    fitting.loss = stepping(fitting, chosen)
                    fitting.loss_sum += fitting.loss * len(chosen)
                    fitting.seen += len(chosen)
                    fitting.step += 1
                    for hook in hooks:
                        hook.on_step(fitting)
                with average.shown(model):
                    size = math.ceil(config.batch_size / fitting.micro_batches)
                    valid_loss, valid_score = evaluate(model, logits_of, task, valid, size, compute)
                if not math.isfinite(valid_loss):
                    raise _NotFinite(f"the valid loss became {valid_loss} at epoch {fitting.epoch + 1}")
            except (_NotFinite, MemoryError, RuntimeError) as error:
                recovery = _recovery(fitting, error, ends[0], setting, compute)
            if recovery is not None:
                # Outside the handler, whose traceback holds on to the memory of the step that failed.
                fitting.go_back(recovery)
                continue
            measured = {"train_loss": fitting.loss_sum / max(1, fitting.seen), "valid_loss": valid_loss}
            fitting.epoch, fitting.step, fitting.loss_sum, fitting.seen = fitting.epoch + 1, 0, 0.0, 0
            measured |= {"epoch": float(fitting.epoch), f"valid_{task.headline}": valid_score, "learning_rate": fitting.rate}
            measured |= fitting.recovered
            fitting.history.append(measured)
            for hook in hooks:
                hook.on_epoch(fitting)
            fitting.stopped = bool(collectives.total(fitting.stopped, compute))
        for hook in hooks:
            hook.on_end(fitting)
    return FitResult(best.weights, best.epoch, fitting.history)


class _NotFinite(Exception):
    """A loss or a gradient is no number; the message says which, and where."""


_HALVINGS = 2
"""Of the learning rate, before a fit that diverges is given up."""


def _recovery(fitting: Fitting, error: Exception, largest: int, setting: str, compute: Compute) -> Recovery:
    """What may help after an error in an epoch; raises where nothing is left to try, and the error that is another's."""
    if isinstance(error, _NotFinite):
        if fitting.halvings == _HALVINGS:
            range_of = f"; or fp16 has too little range for it: set {PLACE}.precision to bf16" if fitting.scaler else ""
            raise TrainingDiverged(
                f"{error} (learning rate {fitting.rate:.3g}), after going back to the start of the epoch with half the rate "
                f"{_HALVINGS} times; nothing was registered. Lower {setting}.learning_rate, or look for broken images in "
                f"the data docs{range_of}"
            ) from None
        return Recovery(f"{error}: back to the start of the epoch with half the learning rate", fitting.halvings + 1)
    if not _out_of_memory(error):
        raise error
    if compute.num_processes > 1:
        raise ConfigError(
            f"{PLACE}.accumulate: memory is not enough for a step of one of {compute.num_processes} processes, with its "
            f"share of a batch in {counted(fitting.micro_batches, 'part')}; set it to {fitting.micro_batches * 2}, or start "
            f"fewer processes"
        ) from error
    parts = fitting.micro_batches * 2
    if parts > largest // 2:
        raise ConfigError(
            f"{setting}.batch_size: memory is not enough for a step on a batch in {fitting.micro_batches} parts, and a part "
            f"is two images at least; end other programs, or choose smaller images or a smaller backbone"
        ) from error
    note = f"memory is not enough for a batch of {largest}: back to the start of the epoch, every batch in {parts} parts"
    return Recovery(note, fitting.halvings, parts)


def _out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in ("not enough memory", "DefaultCPUAllocator", "out of memory"))


@dataclass(frozen=True)
class _Stepping:
    """One step of the optimiser on chosen examples."""

    model: nn.Module
    """What answers in a step: the network, or the network compiled."""
    logits_of: LogitsOf
    loss: LossFunction
    train: Examples
    augment: Augment | None
    mix: Mix | None
    setting: str
    compute: Compute

    def __call__(self, fitting: Fitting, chosen: torch.Tensor) -> float:
        """The loss; raises _NotFinite in place of a step on a loss or a gradient that is not finite.

        In fp16 a gradient that overflows is none of that: the step is left out, and the next one's loss scaled less.
        """
        import torch

        config, optimizer, scaler, compute = fitting.config, fitting.optimizer, fitting.scaler, self.compute
        # A batch too small for all processes is shared by fewer of them: the others compute what counts for nothing.
        shares = min(compute.num_processes, max(1, len(chosen) // 2))
        own = torch.tensor_split(chosen, shares)[compute.rank % shares]
        # What is shared is the mean of the processes' gradients, which is to be that of the batch.
        weight = compute.num_processes if compute.rank < shares else 0
        generator = _generator(config.seed, fitting.epoch, fitting.step, *_number_of(compute))
        for group in optimizer.param_groups:
            group["lr"] = fitting.rate * group["lr_scale"]
        device = device_of(fitting.model)
        inputs, targets = (to_device(each, device) for each in self.train.take(own, generator))
        if self.augment is not None:
            inputs = self.augment(inputs, generator)
        if self.mix is not None:
            inputs, targets = self.mix(inputs, targets, generator)
        # Dropout draws from torch's global generator: seeded per step, restored by _deterministic.
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        optimizer.zero_grad(set_to_none=True)
        losses = []
        # Parts differ by one example at most, so that none is of a single one while others are of several.
        parts = min(fitting.micro_batches, max(1, len(own) // 2))
        with compiling(compute):
            for number in range(parts):
                some, wanted = (torch.tensor_split(whole, parts)[number] for whole in (inputs, targets))
                with collectives.unshared(self.model, when=number < parts - 1):
                    value = self.loss(self._logits(some), wanted) * (len(some) / len(chosen) * weight)
                    (value if scaler is None else scaler.scale(value)).backward()  # type: ignore[no-untyped-call]
                losses.append(value.detach())
        # Read at the end: until then a GPU computes while the processor goes on.
        found = collectives.total(sum(map(float, losses)), compute) / compute.num_processes
        place = f"at epoch {fitting.epoch + 1}, step {fitting.step + 1}"
        if not math.isfinite(found):
            raise _NotFinite(f"the loss became {found} {place}")
        if compute.num_processes > 1:
            collectives.mean_of(collectives.statistics(fitting.model), compute)
        if scaler is not None:
            scaler.unscale_(optimizer)
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            scale = 0.0 if scaler is None else scaler.get_scale()
            if scaler is not None:
                scaler.update()
            if scale <= _LEAST_SCALE:
                raise _NotFinite(f"the gradient's norm became {norm} {place}")
            return found
        if config.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(trained, config.clip_norm, torch.tensor(norm))
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        return found

    def _logits(self, inputs: torch.Tensor) -> torch.Tensor:
        try:
            with self.compute.autocast():
                return self.logits_of(self.model, inputs).float()
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ConfigError(
                f"{self.setting}.batch_size: batch normalisation cannot be trained on a batch of one image; raise it, or "
                f"train on more images"
            ) from error


_LEAST_SCALE = 1.0
"""A gradient in fp16 that overflows though the loss is not scaled up is the network's own."""


def _number_of(compute: Compute) -> tuple[int, ...]:
    """What a process's own draws are drawn from, beside epoch and step."""
    return (compute.rank,) if compute.num_processes > 1 else ()


def _place(model: nn.Module, compute: Compute) -> None:
    """Put the network where it is computed, as its weights are to lie there."""
    import torch

    model.to(compute.device)
    if compute.channels_last:
        model.to(memory_format=torch.channels_last)


def _steps_of(model: nn.Module, compute: Compute) -> nn.Module:
    """What answers in a step; valid is always answered by the network as it will be exported.

    Each size of a batch has a graph of its own: which sizes came before a kill then makes no difference.
    """
    import torch

    if not compute.compile:
        return model
    torch.compiler.reset()  # so many graphs a function are kept at most, and those of earlier fits count
    compiled: Any = torch.compile(model, dynamic=False)
    return cast("nn.Module", compiled)


def _training_mode(model: nn.Module, frozen: Sequence[nn.Module]) -> None:
    model.train()
    for module in frozen:
        module.eval()


def _normalises(model: nn.Module) -> bool:
    """Whether batch normalisation takes its statistics from the batches."""
    from torch import nn

    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return any(isinstance(module, kinds) and module.training for module in model.modules())


def _ends(n: int, batch_size: int, at_least: int) -> list[int]:
    """Where the batches of an epoch end; what is left joins the last one where it is fewer than `at_least`."""
    ends = [*range(batch_size, n, batch_size), n]
    if len(ends) > 1 and ends[-1] - ends[-2] < min(at_least, batch_size):
        del ends[-2]
    return ends


def evaluate(
    model: nn.Module,
    logits_of: LogitsOf,
    task: Task,
    examples: Examples,
    batch_size: int,
    compute: Compute | None = None,
) -> tuple[float, float]:
    """Mean loss and share of right answers in evaluation mode."""
    logits = predict(model, logits_of, examples.inputs, batch_size, compute)
    right = task.right(logits.numpy(), examples.targets.numpy())
    return float(task.loss(logits, examples.targets)), float(right.mean())


def predict(
    model: nn.Module,
    logits_of: LogitsOf,
    inputs: Inputs,
    batch_size: int,
    compute: Compute | None = None,
) -> torch.Tensor:
    """Logits of the first view of all inputs in evaluation mode, in fp32 and in memory; leaves the model in it.

    Several processes answer a share each, and all of them have all the answers.
    """
    import torch

    model.eval()
    device, compute = device_of(model), compute or Compute()
    if len(inputs) < compute.num_processes:
        compute = Compute()  # no share for each, so each answers all
    rows = torch.tensor_split(torch.arange(len(inputs)), compute.num_processes)[compute.rank]
    with torch.no_grad():
        own = [
            logits_of(model, to_device(inputs.take(chosen, None), device)).float().cpu()
            for chosen in torch.split(rows, batch_size)
        ]
    return collectives.gathered(torch.cat(own), compute)


def _order(targets: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """The examples of an epoch, one after the other."""
    import torch

    if sampling == "shuffled":
        return torch.randperm(len(targets), generator=generator)
    if targets.ndim != 1 or targets.is_floating_point():
        raise ConfigError(
            f"sampling: balanced draws from images of one class each, and this task's targets have the shape "
            f"{tuple(targets.shape)} and type {targets.dtype}; use sampling: shuffled"
        )
    shares = 1 / torch.bincount(targets)[targets].double()
    return torch.multinomial(shares, len(targets), replacement=True, generator=generator)


def _generator(*place: int) -> torch.Generator:
    import torch

    generator = torch.Generator()
    seed = 0
    for part in place:
        # Python's own tuple hash would do, but is not promised to stay the same.
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    generator.manual_seed(seed)
    return generator


def _optimizer(
    model: nn.Module,
    groups: Sequence[Sequence[nn.Parameter]],
    config: FittingConfig,
    setting: str,
) -> torch.optim.Optimizer:
    """The optimiser of all parameters that train; each of its groups says its share of the rate as `lr_scale`."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError(f"{setting}: nothing of the network trains; unfreeze a part of it")
    if config.layer_decay != 1 and not groups:
        raise ConfigError(
            f"{setting}.layer_decay: {config.layer_decay} lowers the rate from block to block, and the blocks of what "
            f"trains here are not known; remove it"
        )
    last = len(groups) - 1
    place = {id(parameter): number for number, group in enumerate(groups) for parameter in group}
    found: list[dict[str, Any]] = []
    for distance in range(max(1, len(groups))):
        block = [parameter for parameter in trained if last - place.get(id(parameter), last) == distance]
        scale = config.layer_decay**distance
        for params, decay in (
            ([p for p in block if p.ndim > 1], config.weight_decay),
            ([p for p in block if p.ndim <= 1], 0.0),
        ):
            found.append({"params": params, "weight_decay": decay, "lr_scale": scale})
    if config.optimizer == "sgd":
        return torch.optim.SGD(found, lr=config.learning_rate, momentum=config.momentum, nesterov=config.nesterov)
    return torch.optim.AdamW(found, lr=config.learning_rate)


@contextlib.contextmanager
def _still(frozen: Sequence[nn.Module]) -> Iterator[None]:
    """No gradient is computed for these modules' parameters within."""
    moved = [parameter for module in frozen for parameter in module.parameters() if parameter.requires_grad]
    for parameter in moved:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in moved:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _deterministic(compute: Compute) -> Iterator[None]:
    """The same operations give the same bits within, and the global generators are left as they were.

    On a GPU only the generators are: operations without a deterministic kernel would be refused, and a fit there is not
    exact to the bit anyway.
    """
    import torch

    if compute.on_gpu:
        with torch.random.fork_rng(devices=[compute.device]):
            yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    with torch.random.fork_rng(devices=[]):
        torch.use_deterministic_algorithms(True)
        # Nothing here reads memory it did not write, and filling every buffer first costs a third of a step.
        deterministic.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            deterministic.fill_uninitialized_memory = fill


def write_history(history: list[dict[str, float]], path: Path) -> None:
    """One JSON object an epoch, keys sorted: a resumed run writes the same bytes."""
    write_atomically(path, json.dumps(history, indent=1, sort_keys=True).encode())
