"""What hangs on the fit loop: a mean of the weights, early stopping, metrics, progress, and the checkpoints of a fit."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.contracts.errors import CheckpointMismatch, TamperedArtefact
from components.contracts.progress import MetricSink, Progress
from components.store import seal, sha256_file, unseal, write_atomically

if TYPE_CHECKING:
    import torch
    from torch import nn

    from components.fitting import FittingConfig

LEFTOVERS = ("progress-*.json", "state-*.safetensors")
"""What only a resumed fit needs: kept until the result is published. The pointers go first, see Store.publish."""


@dataclass(frozen=True)
class State:
    """All that a fit needs to go on from one moment."""

    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]
    """What JSON holds."""


@dataclass(frozen=True)
class Recovery:
    """How a fit goes on after a fault, from the start of the epoch."""

    note: str
    """What happened and what is done, in words."""
    halvings: int = 0
    micro_batches: int = 1


@dataclass
class Fitting:
    """A fit that goes on: what its hooks see and may change."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    config: FittingConfig
    steps_per_epoch: int
    hooks: Sequence[Hook]
    epoch: int = 0
    """Epochs done."""
    step: int = 0
    """Steps done in the epoch that goes on."""
    loss: float = 0.0
    """Of the last step."""
    loss_sum: float = 0.0
    seen: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    """One row an epoch."""
    stopped: bool = False
    """Set by a hook: no further epoch begins."""
    halvings: int = 0
    """How often the learning rate was halved, for the rest of the fit."""
    accumulate: int = 1
    """In how many parts a batch is computed where nothing went wrong."""
    micro_batches: int = 1
    """In how many parts a batch is computed."""
    scaler: torch.amp.GradScaler | None = None
    """What scales the loss in fp16."""
    start: State | None = None
    """Of the epoch that goes on."""
    averaged: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Means of parameters that are measured and kept in their place, by name."""

    @property
    def steps(self) -> int:
        """Steps done in the whole fit."""
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.config.rate(self.steps, self.steps_per_epoch) * 0.5**self.halvings

    @property
    def recovered(self) -> dict[str, float]:
        """What the history says of faults; empty where there was none."""
        found = {"rate_halvings": float(self.halvings)} if self.halvings else {}
        parted = {"micro_batches": float(self.micro_batches)} if self.micro_batches > self.accumulate else {}
        return found | parted

    @property
    def loss_scale(self) -> dict[str, Any]:
        """What the scaler needs to go on, as JSON holds it; empty without one."""
        return {} if self.scaler is None else self.scaler.state_dict()

    @loss_scale.setter
    def loss_scale(self, state: dict[str, Any]) -> None:
        if self.scaler is not None:
            self.scaler.load_state_dict(state)

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of what is measured, in memory: the model's state with the means in it."""
        return {name: _in_memory(value) for name, value in {**self.model.state_dict(), **self.averaged}.items()}

    def go_back(self, recovery: Recovery) -> None:
        """To the start of the epoch, and on as the recovery says."""
        assert self.start is not None
        restore(self, self.start)
        self.start = None
        self.halvings, self.micro_batches = recovery.halvings, recovery.micro_batches
        for hook in self.hooks:
            hook.on_fault(self, recovery.note)


class Hook:
    """What hangs on a fit: told at five moments, in the order of the fit's hooks. What is inherited does nothing.

    An exception in one ends the fit; a fit that is taken up goes on from the last checkpoint.
    """

    def on_start(self, fitting: Fitting) -> None:
        """Before the first step, of a resumed fit too: its state is loaded after this."""

    def on_step(self, fitting: Fitting) -> None:
        """After a step; `fitting.step` counts it."""

    def on_epoch(self, fitting: Fitting) -> None:
        """After an epoch; the last row of `fitting.history` is its own."""

    def on_fault(self, fitting: Fitting, note: str) -> None:
        """After a fault that the fit recovers from, back at the start of the epoch; `note` tells it to a person."""

    def on_end(self, fitting: Fitting) -> None:
        """After the last epoch."""

    def state_dict(self) -> dict[str, Any]:
        """All that it needs to go on after a kill: tensors, and values that JSON holds."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""


@dataclass
class MovingAverage(Hook):
    """An exponential moving average of the parameters that train; buffers are the model's own."""

    decay: float
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def on_start(self, fitting: Fitting) -> None:
        self.weights = {name: value.detach().clone() for name, value in self._trained(fitting.model)}
        fitting.averaged = self.weights

    def on_step(self, fitting: Fitting) -> None:
        from torch.optim.swa_utils import get_ema_multi_avg_fn

        decay = min(self.decay, (1 + fitting.steps) / (10 + fitting.steps))
        current = [value.detach() for _, value in self._trained(fitting.model)]
        get_ema_multi_avg_fn(decay)(  # type: ignore[no-untyped-call]
            list(self.weights.values()), current, fitting.steps
        )

    @contextlib.contextmanager
    def shown(self, model: nn.Module) -> Iterator[None]:
        """The model has the average's parameters within; nothing is copied."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.weights)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in self.weights.items():
            value.copy_(state[name])

    def _swap(self, model: nn.Module) -> None:
        for name, value in model.named_parameters():
            if name in self.weights:
                value.data, self.weights[name] = self.weights[name], value.data

    @staticmethod
    def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, value) for name, value in model.named_parameters() if value.requires_grad)


@dataclass
class EarlyStopping(Hook):
    """Stops after `patience` epochs without a lower valid loss; the model ends as it was in the best one."""

    patience: int
    epoch: int = 0
    """The best so far, counted from one."""
    loss: float | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def on_epoch(self, fitting: Fitting) -> None:
        loss = fitting.history[-1]["valid_loss"]
        if self.loss is None or loss < self.loss:
            self.epoch, self.loss = fitting.epoch, loss
            self.weights = fitting.weights()
        fitting.stopped |= fitting.epoch - self.epoch >= self.patience

    def on_end(self, fitting: Fitting) -> None:
        fitting.model.load_state_dict(self.weights)
        fitting.model.eval()

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "loss": self.loss, **{f"weights.{name}": t for name, t in self.weights.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.loss = state["epoch"], state["loss"]
        self.weights = _under("weights.", state)


@dataclass
class MetricLogging(Hook):
    """Sends the row of every epoch to a sink: those of before a kill too, which this sink may never have heard."""

    sink: MetricSink
    numbered: Callable[[dict[str, float]], dict[str, float]] = dict
    """What becomes of a row before it is sent."""
    _sent: int = 0

    def on_epoch(self, fitting: Fitting) -> None:
        for row in map(self.numbered, fitting.history[self._sent :]):
            self.sink.log(int(row["epoch"]), row)
        self._sent = len(fitting.history)

    on_end = on_epoch


@dataclass
class ProgressReporting(Hook):
    """Tells how many steps are done."""

    progress: Progress
    headline: str
    """The task's: told at the end of every epoch."""
    label: str = ""
    """What stands before each note, such as the phase."""
    _began: bool = False

    def on_step(self, fitting: Fitting) -> None:
        if not self._began:
            self._began = True
            self._tell(fitting, f"{self.label}epoch {fitting.epoch + 1}")
        self._tell(fitting, "")

    def on_epoch(self, fitting: Fitting) -> None:
        score = fitting.history[-1][f"valid_{self.headline}"]
        self._tell(fitting, f"{self.label}epoch {fitting.epoch}: valid {self.headline} {score:.4f}")

    def on_fault(self, fitting: Fitting, note: str) -> None:
        self._tell(fitting, f"{self.label}{note}")

    def _tell(self, fitting: Fitting, note: str) -> None:
        self.progress(fitting.steps, fitting.config.epochs * fitting.steps_per_epoch, note)


@dataclass
class Checkpointing(Hook):
    """Writes the whole state of the fit and of its hooks into `out`, and takes up what a killed one left there.

    Within an epoch the state at its start is kept beside, for a fault after the resumption; it is written once an epoch.

    `identity` names config and data: the checkpoint of another one is refused. Several fits may share a folder, each with
    a `number` of its own.
    """

    out: Path
    identity: str
    number: int = 1
    writes: bool = True
    """Of several processes the first; all of them take up what it wrote."""
    _saved_at: float = 0.0
    _written: list[dict[str, Any]] = field(default_factory=list)
    """The states that the pointer names, the start of the epoch first."""

    def on_start(self, fitting: Fitting) -> None:
        self._saved_at = time.monotonic()
        if self._pointer.exists():
            self._resume(fitting)

    def on_step(self, fitting: Fitting) -> None:
        if self.writes and time.monotonic() - self._saved_at > fitting.config.checkpoint_every_s:
            self._save(fitting)

    on_epoch = on_step

    def on_end(self, fitting: Fitting) -> None:
        if self.writes:
            self._save(fitting)

    @property
    def _pointer(self) -> Path:
        return self.out / f"progress-{self.number}.json"

    def _save(self, fitting: Fitting) -> None:
        states = ([fitting.start] if fitting.step and fitting.start else []) + [capture(fitting)]
        self._written = [self._write(state) for state in states]
        # The pointer moves last: until it does, the states before are the ones that count.
        write_atomically(self._pointer, seal({"schema_version": 3, "identity": self.identity, "states": self._written}))
        kept = {written["file"] for written in self._written}
        for older in self.out.glob(f"state-{self.number}-*.safetensors"):
            if older.name not in kept:
                older.unlink()
        self._saved_at = time.monotonic()

    def _write(self, state: State) -> dict[str, Any]:
        """Write the state's tensors, where they are not there already; returns what the pointer says of it."""
        from safetensors.torch import save as save_tensors

        fit = state.values["fitting"]
        name = (
            f"state-{self.number}-{fit['epoch']:05d}-{fit['step']:07d}-{fit['halvings']}-{fit['micro_batches']}.safetensors"
        )
        for written in self._written:
            if written["file"] == name:
                return written
        path = self.out / name
        write_atomically(path, save_tensors(state.tensors))
        return {"file": name, "sha256": sha256_file(path), **state.values}

    def _resume(self, fitting: Fitting) -> None:
        pointer = self._pointer
        body: dict[str, Any] | None = unseal(pointer.read_bytes())
        if body is None:
            raise TamperedArtefact(f"{pointer} was changed after it was written; {self._remedy}")
        if body["identity"] != self.identity:
            raise CheckpointMismatch(
                f"{pointer} belongs to another config or other data (found {str(body['identity'])[:12]}, "
                f"expected {self.identity[:12]}); {self._remedy}"
            )
        self._written = body["states"]
        states = [self._read(written) for written in self._written]
        hooks, expected = states[-1].values["hooks"].keys(), dict(_named(fitting.hooks)).keys()
        if hooks != expected:
            raise CheckpointMismatch(
                f"{pointer} was written with other hooks (found {', '.join(hooks)}; expected {', '.join(expected)}); "
                f"{self._remedy}"
            )
        fitting.start = states[0]
        try:
            restore(fitting, states[-1])
        except RuntimeError as error:
            raise CheckpointMismatch(
                f"{pointer} does not fit this model: {str(error).splitlines()[0]}; {self._remedy}"
            ) from error

    def _read(self, written: Mapping[str, Any]) -> State:
        from safetensors.torch import load as load_tensors

        path = self.out / str(written["file"])
        data = path.read_bytes() if path.exists() else b""
        if not data or sha256_file(path) != written["sha256"]:
            raise TamperedArtefact(f"{path} is missing or was changed after it was written; {self._remedy}")
        return State(load_tensors(data), {name: written[name] for name in ("fitting", "hooks")})

    @property
    def _remedy(self) -> str:
        return f"remove {self.out} to train from the start"


_RESUMED = ("epoch", "step", "loss_sum", "seen", "history", "stopped", "halvings", "micro_batches", "loss_scale")
"""The numbers of a fit that a state holds."""


def capture(fitting: Fitting) -> State:
    """The state of the fit and of its hooks, copied into memory, whatever device it lies on."""
    import torch

    tensors = {f"model.{name}": value for name, value in fitting.model.state_dict().items()}
    for index, slots in fitting.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in slots.items() if value is not None}
    hooks: dict[str, dict[str, Any]] = {}
    for name, hook in _named(fitting.hooks):
        state = hook.state_dict()
        tensors |= {f"{name}.{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
        hooks[name] = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
    values = copy.deepcopy({"fitting": {name: getattr(fitting, name) for name in _RESUMED}, "hooks": hooks})
    return State({name: _in_memory(value).contiguous() for name, value in tensors.items()}, values)


def _in_memory(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def restore(fitting: Fitting, state: State) -> None:
    """Put the fit and its hooks back where the state was captured; raises RuntimeError where it does not fit the model.

    Optimiser and hooks keep what they are given and change it in place: the state is used up.
    """
    tensors, values = state.tensors, state.values
    fitting.model.load_state_dict(_under("model.", tensors))
    _restore_optimizer(fitting.optimizer, _under("optimizer.", tensors))
    for name, value in values["fitting"].items():
        setattr(fitting, name, value)
    for name, hook in _named(fitting.hooks):
        hook.load_state_dict(values["hooks"][name] | _under(f"{name}.", tensors))


def _named(hooks: Sequence[Hook]) -> list[tuple[str, Hook]]:
    return [(f"{place}-{type(hook).__name__}", hook) for place, hook in enumerate(hooks)]


def _under(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    import torch

    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, slot = name.split(".", 1)
        parameter = trained[int(index)]
        if slot != "step" and tensor.shape == parameter.shape:
            # Where and as the parameter lies, so that a resumed step takes no longer.
            tensor = torch.empty_like(parameter).copy_(tensor)
        slots.setdefault(int(index), {})[slot] = tensor
    whole = optimizer.state_dict()
    whole["state"] = slots
    optimizer.load_state_dict(whole)
