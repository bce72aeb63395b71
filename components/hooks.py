"""What hangs on the fit loop: early stopping, live metrics, progress and the checkpoints that a killed fit goes on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.contracts.errors import CheckpointMismatch, TamperedArtefact, TrainingDiverged
from components.contracts.progress import MetricSink, Progress
from components.store import seal, sha256_file, unseal, write_atomically

if TYPE_CHECKING:
    import torch
    from torch import nn

    from components.fitting import FittingConfig

LEFTOVERS = ("progress-*.json", "state-*.safetensors")
"""What only a resumed fit needs: kept until the result is published. The pointers go first, see Store.publish."""


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
    """Of the last step; no step is taken on one that is not finite."""
    loss_sum: float = 0.0
    seen: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    """One row an epoch."""
    stopped: bool = False
    """Set by a hook: no further epoch begins."""

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.config.rate(self.epoch * self.steps_per_epoch + self.step, self.steps_per_epoch)


class Hook:
    """What hangs on a fit: told at four moments, in the order of the fit's hooks. What is inherited does nothing.

    An exception in one ends the fit; a fit that is taken up goes on from the last checkpoint.
    """

    def on_start(self, fitting: Fitting) -> None:
        """Before the first step, of a resumed fit too: its state is loaded after this."""

    def on_step(self, fitting: Fitting) -> None:
        """After a step; `fitting.step` counts it."""

    def on_epoch(self, fitting: Fitting) -> None:
        """After an epoch; the last row of `fitting.history` is its own."""

    def on_end(self, fitting: Fitting) -> None:
        """After the last epoch."""

    def state_dict(self) -> dict[str, Any]:
        """All that it needs to go on after a kill: tensors, and values that JSON holds."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""


@dataclass(frozen=True)
class FiniteLoss(Hook):
    """Ends the fit at once when a loss is no number."""

    setting: str

    def on_step(self, fitting: Fitting) -> None:
        if not math.isfinite(fitting.loss):
            rate = fitting.optimizer.param_groups[0]["lr"]
            raise TrainingDiverged(
                f"the loss became {fitting.loss} at epoch {fitting.epoch + 1}, step {fitting.step} (learning rate "
                f"{rate:.3g}); nothing was registered. Lower {self.setting}.learning_rate, or look for broken images in the "
                f"data docs"
            )

    def on_epoch(self, fitting: Fitting) -> None:
        loss = fitting.history[-1]["valid_loss"]
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"the valid loss became {loss} at epoch {fitting.epoch}; lower {self.setting}.learning_rate"
            )


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
            self.weights = {name: value.detach().clone() for name, value in fitting.model.state_dict().items()}
        fitting.stopped |= fitting.epoch - self.epoch >= self.patience

    def on_end(self, fitting: Fitting) -> None:
        fitting.model.load_state_dict(self.weights)
        fitting.model.eval()

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "loss": self.loss, **{f"weights.{name}": t for name, t in self.weights.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.loss = state["epoch"], state["loss"]
        self.weights = _under("weights.", state)


@dataclass(frozen=True)
class MetricLogging(Hook):
    """Sends the row of every epoch to a sink."""

    sink: MetricSink
    numbered: Callable[[dict[str, float]], dict[str, float]] = dict
    """What becomes of a row before it is sent."""

    def on_epoch(self, fitting: Fitting) -> None:
        row = self.numbered(fitting.history[-1])
        self.sink.log(int(row["epoch"]), row)


@dataclass(frozen=True)
class ProgressReporting(Hook):
    """Tells how many steps are done."""

    progress: Progress
    headline: str
    """The task's: told at the end of every epoch."""
    label: str = ""
    """What stands before each note, such as the phase."""

    def on_step(self, fitting: Fitting) -> None:
        self._tell(fitting, "")

    def on_epoch(self, fitting: Fitting) -> None:
        score = fitting.history[-1][f"valid_{self.headline}"]
        self._tell(fitting, f"{self.label}epoch {fitting.epoch}: valid {self.headline} {score:.4f}")

    def _tell(self, fitting: Fitting, note: str) -> None:
        steps = fitting.steps_per_epoch
        self.progress(fitting.epoch * steps + fitting.step, fitting.config.epochs * steps, note)


@dataclass
class Checkpointing(Hook):
    """Writes the whole state of the fit and of its hooks into `out`, and takes up what a killed one left there.

    `identity` names config and data: the checkpoint of another one is refused. Several fits may share a folder, each with
    a `number` of its own.
    """

    out: Path
    identity: str
    number: int = 1
    _saved_at: float = 0.0

    def on_start(self, fitting: Fitting) -> None:
        self._saved_at = time.monotonic()
        if self._pointer.exists():
            self._resume(fitting)

    def on_step(self, fitting: Fitting) -> None:
        if time.monotonic() - self._saved_at > fitting.config.checkpoint_every_s:
            self._save(fitting)

    on_epoch = on_step

    def on_end(self, fitting: Fitting) -> None:
        self._save(fitting)

    @property
    def _pointer(self) -> Path:
        return self.out / f"progress-{self.number}.json"

    def _save(self, fitting: Fitting) -> None:
        import torch
        from safetensors.torch import save as save_tensors

        tensors = {f"model.{name}": value for name, value in fitting.model.state_dict().items()}
        for index, slots in fitting.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in slots.items()}
        values: dict[str, dict[str, Any]] = {}
        for name, hook in _named(fitting.hooks):
            state = hook.state_dict()
            tensors |= {f"{name}.{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
            values[name] = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
        data = save_tensors({name: value.detach().contiguous().clone() for name, value in tensors.items()})
        path = self.out / f"state-{self.number}-{fitting.epoch:05d}-{fitting.step:07d}.safetensors"
        write_atomically(path, data)
        body = {
            "schema_version": 2,
            "identity": self.identity,
            "file": path.name,
            "sha256": sha256_file(path),
            "fitting": {name: getattr(fitting, name) for name in _RESUMED},
            "hooks": values,
        }
        # The pointer moves last: until it does, the state before is the one that counts.
        write_atomically(self._pointer, seal(body))
        for older in self.out.glob(f"state-{self.number}-*.safetensors"):
            if older != path:
                older.unlink()
        self._saved_at = time.monotonic()

    def _resume(self, fitting: Fitting) -> None:
        from safetensors.torch import load as load_tensors

        pointer, remedy = self._pointer, f"remove {self.out} to train from the start"
        body: dict[str, Any] | None = unseal(pointer.read_bytes())
        if body is None:
            raise TamperedArtefact(f"{pointer} was changed after it was written; {remedy}")
        if body["identity"] != self.identity:
            raise CheckpointMismatch(
                f"{pointer} belongs to another config or other data (found {str(body['identity'])[:12]}, "
                f"expected {self.identity[:12]}); {remedy}"
            )
        hooks = dict(_named(fitting.hooks))
        if body["hooks"].keys() != hooks.keys():
            raise CheckpointMismatch(
                f"{pointer} was written with other hooks (found {', '.join(body['hooks'])}; expected {', '.join(hooks)}); "
                f"{remedy}"
            )
        path = self.out / str(body["file"])
        data = path.read_bytes() if path.exists() else b""
        if not data or sha256_file(path) != body["sha256"]:
            raise TamperedArtefact(f"{path} is missing or was changed after it was written; {remedy}")
        tensors = load_tensors(data)
        try:
            fitting.model.load_state_dict(_under("model.", tensors))
        except RuntimeError as error:
            raise CheckpointMismatch(f"{path} does not fit this model: {str(error).splitlines()[0]}; {remedy}") from error
        _restore_optimizer(fitting.optimizer, _under("optimizer.", tensors))
        for name, value in body["fitting"].items():
            setattr(fitting, name, value)
        for name, hook in hooks.items():
            hook.load_state_dict(body["hooks"][name] | _under(f"{name}.", tensors))


_RESUMED = ("epoch", "step", "loss_sum", "seen", "history", "stopped")
"""The numbers of a fit that a checkpoint holds."""


def _named(hooks: Sequence[Hook]) -> list[tuple[str, Hook]]:
    return [(f"{place}-{type(hook).__name__}", hook) for place, hook in enumerate(hooks)]


def _under(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, slot = name.split(".", 1)
        slots.setdefault(int(index), {})[slot] = tensor
    whole = optimizer.state_dict()
    whole["state"] = slots
    optimizer.load_state_dict(whole)
