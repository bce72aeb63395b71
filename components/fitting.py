"""The fit loop that training and optimisation share: AdamW, cosine schedule, early stopping, exact resumption.

Everything random is drawn from (seed, epoch, step), and the schedule is a function of the step, so the whole state of a
run is its tensors and a few numbers. A run that is killed at any moment and started again ends in the same bits as one
that was not, on the same machine with the same number of threads. Nothing is pickled: see infra/decisions/0003.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from components.contracts.errors import CheckpointMismatch, TamperedArtefact, TrainingDiverged
from components.contracts.families import Task
from components.contracts.progress import MetricSink, NullSink, Progress, silent
from components.contracts.records import Record
from components.store import seal, sha256_file, unseal, write_atomically

if TYPE_CHECKING:
    import torch
    from torch import nn

PROGRESS = "progress.json"
LEFTOVERS = (PROGRESS, "state-*.safetensors")
"""What only a resumed fit needs: kept until the result is published. The pointer goes first, see Store.publish."""


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


@dataclass(frozen=True)
class Examples:
    """Inputs (n, ...) and the task's targets (n, ...), in memory or memory-mapped."""

    inputs: torch.Tensor
    targets: torch.Tensor


@dataclass
class _State:
    epoch: int = 0
    step: int = 0
    """Steps done in this epoch."""
    loss_sum: float = 0.0
    seen: int = 0
    best_loss: float = math.inf
    best_epoch: int = -1
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class FitResult:
    """The best epoch's weights and what every epoch measured."""

    best: dict[str, torch.Tensor]
    best_epoch: int
    history: list[dict[str, float]]


Augment = Callable[["torch.Tensor", "torch.Generator"], "torch.Tensor"]


def fit(
    model: nn.Module,
    logits_of: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    task: Task,
    train: Examples,
    valid: Examples,
    config: FittingConfig,
    *,
    identity: str,
    out: Path,
    augment: Augment | None = None,
    sink: MetricSink | None = None,
    progress: Progress = silent,
) -> FitResult:
    """Fit `model` in place; `identity` names config and data, and a checkpoint in `out` of another one is refused.

    Raises TrainingDiverged on a non-finite loss, CheckpointMismatch, TamperedArtefact.
    """
    import torch

    sink = sink or NullSink()
    with _deterministic():
        # The head of a resumed run must be drawn from the same seed as the first time; the caller built the model.
        optimizer = _adamw(model, config)
        state, best = _resume(model, optimizer, identity, out)
        steps = math.ceil(len(train.targets) / config.batch_size)
        last_saved = time.monotonic()
        for epoch in range(state.epoch, config.epochs):
            if state.epoch - 1 - state.best_epoch >= config.patience:
                break
            order = torch.randperm(len(train.targets), generator=_generator(config.seed, epoch))
            model.train()
            for step in range(state.step, steps):
                rate = _rate(config, epoch * steps + step, config.epochs * steps, steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                chosen = order[step * config.batch_size : (step + 1) * config.batch_size]
                value = _step(model, optimizer, logits_of, task.loss, train, chosen, (config.seed, epoch, step), augment)
                if not math.isfinite(value):
                    raise TrainingDiverged(
                        f"the loss became {value} at epoch {epoch + 1}, step {step + 1} (learning rate {rate:.3g}); nothing "
                        f"was registered. Lower training.fit.learning_rate, or look for broken images in the data docs"
                    )
                state.loss_sum += value * len(chosen)
                state.seen += len(chosen)
                state.step = step + 1
                progress(epoch * steps + step + 1, config.epochs * steps)
                if time.monotonic() - last_saved > config.checkpoint_every_s:
                    _save(model, optimizer, state, best, identity, out)
                    last_saved = time.monotonic()
            valid_loss, valid_score = evaluate(model, logits_of, task, valid, config.batch_size)
            measured = {
                "epoch": float(epoch + 1),
                "train_loss": state.loss_sum / max(1, state.seen),
                "valid_loss": valid_loss,
                f"valid_{task.headline}": valid_score,
                "learning_rate": _rate(config, (epoch + 1) * steps, config.epochs * steps, steps),
            }
            if not math.isfinite(valid_loss):
                raise TrainingDiverged(
                    f"the valid loss became {valid_loss} at epoch {epoch + 1}; lower training.fit.learning_rate"
                )
            state.history.append(measured)
            if valid_loss < state.best_loss:
                state.best_loss, state.best_epoch = valid_loss, epoch
                best = {name: value.detach().clone() for name, value in model.state_dict().items()}
            state.epoch, state.step, state.loss_sum, state.seen = epoch + 1, 0, 0.0, 0
            sink.log(epoch + 1, measured)
            progress(
                (epoch + 1) * steps, config.epochs * steps, f"epoch {epoch + 1}: valid {task.headline} {valid_score:.4f}"
            )
            if time.monotonic() - last_saved > config.checkpoint_every_s:
                _save(model, optimizer, state, best, identity, out)
                last_saved = time.monotonic()
        _save(model, optimizer, state, best, identity, out)
    model.load_state_dict(best)
    model.eval()
    return FitResult(best, state.best_epoch + 1, state.history)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    logits_of: Callable[[nn.Module, torch.Tensor], torch.Tensor],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    train: Examples,
    chosen: torch.Tensor,
    place: tuple[int, int, int],
    augment: Augment | None,
) -> float:
    import torch

    generator = _generator(*place)
    inputs = train.inputs[chosen]
    if augment is not None:
        inputs = augment(inputs, generator)
    # Dropout draws from torch's global generator: seeded per step, restored by _deterministic.
    torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
    optimizer.zero_grad(set_to_none=True)
    value = loss(logits_of(model, inputs), train.targets[chosen])
    found = float(value.detach())
    if math.isfinite(found):
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
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
    inputs: torch.Tensor,
    batch_size: int,
) -> torch.Tensor:
    """Logits of all inputs in evaluation mode; leaves the model in it."""
    import torch

    model.eval()
    with torch.no_grad():
        return torch.cat([logits_of(model, inputs[i : i + batch_size]) for i in range(0, len(inputs), batch_size)])


def _generator(*place: int) -> torch.Generator:
    import torch

    generator = torch.Generator()
    seed = 0
    for part in place:
        # Python's own tuple hash would do, but is not promised to stay the same.
        seed = (seed * 1_000_003 + part + 1) % (2**63 - 1)
    generator.manual_seed(seed)
    return generator


def _rate(config: FittingConfig, step: int, total: int, steps_per_epoch: int) -> float:
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1.0, total - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def _adamw(model: nn.Module, config: FittingConfig) -> torch.optim.AdamW:
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
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


def _save(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: _State,
    best: dict[str, torch.Tensor],
    identity: str,
    out: Path,
) -> None:
    from safetensors.torch import save as save_tensors

    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in best.items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in slots.items()}
    data = save_tensors({name: value.detach().contiguous().clone() for name, value in tensors.items()})
    path = out / f"state-{state.epoch:05d}-{state.step:07d}.safetensors"
    write_atomically(path, data)
    body = {
        "schema_version": 1,
        "identity": identity,
        "file": path.name,
        "sha256": sha256_file(path),
        "epoch": state.epoch,
        "step": state.step,
        "loss_sum": state.loss_sum,
        "seen": state.seen,
        "best_loss": None if math.isinf(state.best_loss) else state.best_loss,
        "best_epoch": state.best_epoch,
        "history": state.history,
    }
    # The pointer moves last: until it does, the state before is the one that counts.
    write_atomically(out / PROGRESS, seal(body))
    for older in out.glob("state-*.safetensors"):
        if older != path:
            older.unlink()


def _resume(
    model: nn.Module, optimizer: torch.optim.Optimizer, identity: str, out: Path
) -> tuple[_State, dict[str, torch.Tensor]]:
    pointer = out / PROGRESS
    if not pointer.exists():
        return _State(), {}
    remedy = f"remove {out} to train from the start"
    body: dict[str, Any] | None = unseal(pointer.read_bytes())
    if body is None:
        raise TamperedArtefact(f"{pointer} was changed after it was written; {remedy}")
    if body["identity"] != identity:
        raise CheckpointMismatch(
            f"{pointer} belongs to another config or other data (found {str(body['identity'])[:12]}, "
            f"expected {identity[:12]}); {remedy}"
        )
    path = out / str(body["file"])
    data = path.read_bytes() if path.exists() else b""
    if not data or sha256_file(path) != body["sha256"]:
        raise TamperedArtefact(f"{path} is missing or was changed after it was written; {remedy}")
    from safetensors.torch import load as load_tensors

    tensors = load_tensors(data)
    try:
        model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    except RuntimeError as error:
        raise CheckpointMismatch(f"{path} does not fit this model: {str(error).splitlines()[0]}; {remedy}") from error
    _restore_optimizer(optimizer, tensors)
    state = _State(
        epoch=body["epoch"],
        step=body["step"],
        loss_sum=body["loss_sum"],
        seen=body["seen"],
        best_loss=math.inf if body["best_loss"] is None else body["best_loss"],
        best_epoch=body["best_epoch"],
        history=[dict(row) for row in body["history"]],
    )
    return state, {n.removeprefix("best."): t for n, t in tensors.items() if n.startswith("best.")}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".", 2)
            slots.setdefault(int(index), {})[slot] = tensor
    whole = optimizer.state_dict()
    whole["state"] = slots
    optimizer.load_state_dict(whole)


def write_history(history: list[dict[str, float]], path: Path) -> None:
    """One JSON object an epoch, keys sorted: a resumed run writes the same bytes."""
    write_atomically(path, json.dumps(history, indent=1, sort_keys=True).encode())
