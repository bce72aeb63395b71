"""The fit loop that training and optimisation share: AdamW, cosine schedule, and hooks for everything else.

Everything random is drawn from (seed, epoch, step), and the schedule is a function of the step, so the whole state of a
run is its tensors and a few numbers. A run that is killed at any moment and started again ends in the same bits as one
that was not, on the same machine with the same number of threads. Nothing is pickled: see infra/decisions/0003.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from components.contracts.errors import ConfigError
from components.contracts.families import Task
from components.contracts.records import Record
from components.hooks import Checkpointing, EarlyStopping, FiniteLoss, Fitting, Hook
from components.store import write_atomically

if TYPE_CHECKING:
    import torch
    from torch import nn


class FittingConfig(Record):
    """Schedule and optimiser of one fit."""

    epochs: int = Field(default=30, ge=1, le=10_000)
    batch_size: int = Field(default=64, ge=1, le=65_536)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    """AdamW's, on weights of two or more dimensions only."""
    warmup_epochs: float = Field(default=1.0, ge=0)
    patience: int = Field(default=10, ge=1)
    """Epochs without a lower valid loss before the fit stops."""
    checkpoint_every_s: float = Field(default=30.0, ge=0)
    """A checkpoint is written at the end of an epoch or step when the last one is older than this."""
    seed: int = Field(default=0, ge=0)

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step: up in a line while warming up, then down in half a cosine to zero."""
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        share = (step - warmup) / max(1.0, self.epochs * steps_per_epoch - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


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


@dataclass(frozen=True)
class FitResult:
    """The best epoch's weights and what every epoch measured."""

    best: dict[str, torch.Tensor]
    best_epoch: int
    history: list[dict[str, float]]


Augment = Callable[["torch.Tensor", "torch.Generator"], "torch.Tensor"]
Mix = Callable[["torch.Tensor", "torch.Tensor", "torch.Generator"], tuple["torch.Tensor", "torch.Tensor"]]
"""Inputs and targets of a batch to mixed inputs and shares of classes."""
LossFunction = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""Logits and targets of a batch to their mean loss."""
Sampling = Literal["shuffled", "balanced"]


def fit(
    model: nn.Module,
    logits_of: Callable[[nn.Module, torch.Tensor], torch.Tensor],
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
    hooks: Sequence[Hook] = (),
    setting: str = "training.fit",
) -> FitResult:
    """Fit `model` in place to its best epoch; `setting` is where a recipe keeps `config`, and errors name it.

    Steps make `loss` smaller (the task's where none is given) on inputs that `augment` and then `mix` changed; the valid
    loss is always the task's, so that fits can be compared. An epoch takes every example once, or with `balanced` sampling
    as many draws as there are examples, of every class equally often. `frozen` modules stay in evaluation mode and keep
    their parameters. Raises TrainingDiverged on a non-finite loss, ConfigError, CheckpointMismatch, TamperedArtefact.
    """
    best = EarlyStopping(config.patience)
    # What diverged is never saved, and what is saved is what all the others have made of the step.
    hooks = (FiniteLoss(setting), best, *hooks, checkpointing)
    with _deterministic():
        fitting = Fitting(
            model, _adamw(model, frozen, config), config, math.ceil(len(train.targets) / config.batch_size), hooks
        )
        for hook in hooks:
            hook.on_start(fitting)
        while fitting.epoch < config.epochs and not fitting.stopped:
            order = _order(train.targets, sampling, _generator(config.seed, fitting.epoch))
            model.train()
            for module in frozen:
                module.eval()
            while fitting.step < fitting.steps_per_epoch:
                chosen = order[fitting.step * config.batch_size : (fitting.step + 1) * config.batch_size]
                fitting.loss = _step(fitting, logits_of, loss or task.loss, train, chosen, augment, mix)
                fitting.loss_sum += fitting.loss * len(chosen)
                fitting.seen += len(chosen)
                fitting.step += 1
                for hook in hooks:
                    hook.on_step(fitting)
            valid_loss, valid_score = evaluate(model, logits_of, task, valid, config.batch_size)
            measured = {"train_loss": fitting.loss_sum / max(1, fitting.seen), "valid_loss": valid_loss}
            fitting.epoch, fitting.step, fitting.loss_sum, fitting.seen = fitting.epoch + 1, 0, 0.0, 0
            measured |= {"epoch": float(fitting.epoch), f"valid_{task.headline}": valid_score, "learning_rate": fitting.rate}
            fitting.history.append(measured)
            for hook in hooks:
                hook.on_epoch(fitting)
        for hook in hooks:
            hook.on_end(fitting)
    return FitResult(best.weights, best.epoch, fitting.history)


def _step(
    fitting: Fitting,
    logits_of: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    loss: LossFunction,
    train: Examples,
    chosen: torch.Tensor,
    augment: Augment | None,
    mix: Mix | None,
) -> float:
    """One step of the optimiser on the chosen examples, none on a loss that is not finite; returns the loss."""
    import torch

    generator = _generator(fitting.config.seed, fitting.epoch, fitting.step)
    for group in fitting.optimizer.param_groups:
        group["lr"] = fitting.rate
    inputs, targets = train.inputs.take(chosen, generator), train.targets[chosen]
    if augment is not None:
        inputs = augment(inputs, generator)
    if mix is not None:
        inputs, targets = mix(inputs, targets, generator)
    # Dropout draws from torch's global generator: seeded per step, restored by _deterministic.
    torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
    fitting.optimizer.zero_grad(set_to_none=True)
    value = loss(logits_of(fitting.model, inputs), targets)
    found = float(value.detach())
    if math.isfinite(found):
        value.backward()  # type: ignore[no-untyped-call]
        fitting.optimizer.step()
    return found


def evaluate(
    model: nn.Module,
    logits_of: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    task: Task,
    examples: Examples,
    batch_size: int,
) -> tuple[float, float]:
    """Mean loss and share of right answers in evaluation mode."""
    logits = predict(model, logits_of, examples.inputs, batch_size)
    right = task.right(logits.numpy(), examples.targets.numpy())
    return float(task.loss(logits, examples.targets)), float(right.mean())


def predict(
    model: nn.Module,
    logits_of: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    inputs: Inputs,
    batch_size: int,
) -> torch.Tensor:
    """Logits of the first view of all inputs in evaluation mode; leaves the model in it."""
    import torch

    model.eval()
    with torch.no_grad():
        rows = torch.split(torch.arange(len(inputs)), batch_size)
        return torch.cat([logits_of(model, inputs.take(chosen, None)) for chosen in rows])


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


def _adamw(model: nn.Module, frozen: Sequence[nn.Module], config: FittingConfig) -> torch.optim.AdamW:
    import torch

    kept = {id(parameter) for module in frozen for parameter in module.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in kept]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
    )


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    with torch.random.fork_rng():
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
