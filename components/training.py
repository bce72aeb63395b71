"""Training: Splits -> Checkpoint. Phases, one after the other: a head on frozen, cached features, or every parameter.

The temperature of the answer is fitted on the valid split (Guo et al. 2017).
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from components import plugins
from components.contracts.data import SplitName, Splits
from components.contracts.errors import ConfigError, UnknownName, WeightsUnavailable
from components.contracts.families import Backbone, Task
from components.contracts.models import Checkpoint, Preprocessing
from components.contracts.progress import MetricSink, NullSink, Progress, silent
from components.contracts.records import Record, Stored, canonical_json, sha256_text
from components.features import embed
from components.fitting import Examples, FittingConfig, fit, predict, write_history
from components.hooks import Checkpointing, MetricLogging, ProgressReporting
from components.images import batches
from components.samples import rows
from components.store import describe, sha256_file
from components.weights import from_safetensors

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from components.checkpoints import ImageModel


class Augmentation(Record):
    """Random geometric changes of a training image; all zero for none."""

    rotate_degrees: float = Field(default=0.0, ge=0, le=180)
    translate: float = Field(default=0.0, ge=0, le=0.5)
    """Largest shift as a share of the side."""
    scale: float = Field(default=0.0, ge=0, le=0.5)
    shear: float = Field(default=0.0, ge=0, le=0.5)
    horizontal_flip: bool = False

    @property
    def active(self) -> bool:
        return self.horizontal_flip or max(self.rotate_degrees, self.translate, self.scale, self.shear) > 0

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """uint8 (n, h, w, c) to the same shape, one random affine map per image; borders repeat."""
        import torch
        from torch.nn import functional

        def uniform(limit: float) -> torch.Tensor:
            return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

        angle = uniform(math.radians(self.rotate_degrees))
        zoom, shear = 1 + uniform(self.scale), uniform(self.shear)
        mirror = torch.ones(len(images))
        if self.horizontal_flip:
            mirror = (torch.rand(len(images), generator=generator) < 0.5).float() * 2 - 1
        cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        rows_xy = torch.stack(
            [
                torch.stack([cosine * mirror, (shear - sine), uniform(2 * self.translate)], dim=1),
                torch.stack([sine * mirror, cosine, uniform(2 * self.translate)], dim=1),
            ],
            dim=1,
        )
        planes = images.permute(0, 3, 1, 2).float()
        grid = functional.affine_grid(rows_xy, list(planes.shape), align_corners=False)
        moved = functional.grid_sample(planes, grid, padding_mode="border", align_corners=False)
        return moved.round().to(torch.uint8).permute(0, 2, 3, 1)


class Phase(Record):
    """One fit: what of the network trains, on which images, for how long."""

    trains: Literal["head", "all"]
    """`head` trains on cached features of the backbone as it is, `all` trains every parameter."""
    augmentation: Augmentation = Augmentation()
    fit: FittingConfig = FittingConfig()


class TrainingConfig(Record):
    """Which network, from which weights, fitted in which phases.

    A training of one phase may say `mode`, `augmentation` and `fit` in place of `phases`; as JSON it is what was said.
    """

    backbone: str
    backbone_settings: dict[str, bool | int | float | str] = {}
    task: str = "classification"
    task_settings: dict[str, bool | int | float | str] = {}
    weights: str = "random"
    """`random`, a name that the backbone knows, or the path of a local .safetensors file of the backbone."""
    mode: Literal["scratch", "frozen"] = "scratch"
    """`scratch` trains every parameter, `frozen` trains a head on cached features of the backbone."""
    augmentation: Augmentation = Augmentation()
    fit: FittingConfig = FittingConfig()
    phases: tuple[Phase, ...] = Field(default=(), min_length=1)
    """Each goes on from the best epoch of the one before."""

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
        left_out = _ONE_PHASE if self.phases else ("phases",)
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


def local_weights(config: TrainingConfig, root: Path) -> Path | None:
    """The weights file that the section names, relative to the workspace `root`; None for weights known by name."""
    return root / config.weights if config.weights.endswith(".safetensors") else None


def check(config: TrainingConfig, root: Path) -> None:
    """Raise ConfigError for a section that cannot work, before any work is done."""
    backbone: Backbone = plugins.load("backbones", config.backbone, dict(config.backbone_settings))
    plugins.load("tasks", config.task, dict(config.task_settings))
    local = local_weights(config, root)
    if config.weights != "random" and local is None and config.weights not in backbone.weights_choices:
        raise UnknownName(
            f"training.weights for backbone {config.backbone!r}",
            config.weights,
            ["random", *backbone.weights_choices, "<path>.safetensors"],
        )
    if local is not None and not local.is_file():
        raise ConfigError(f"training.weights: {local} does not exist")
    for number, phase in enumerate(config.all_phases, 1):
        place, frozen = config.place(number), "trains: head" if config.phases else "mode: frozen"
        if phase.trains == "head" and number == 1 and config.weights == "random":
            raise ConfigError(
                f"{place}: {frozen} on random weights learns nothing; choose training.weights from: "
                f"{', '.join(backbone.weights_choices) or '<path>.safetensors'}"
            )
        if phase.trains == "head" and phase.augmentation.active:
            raise ConfigError(f"{place}.augmentation has no effect with {frozen}: features are computed once; remove it")


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
) -> Checkpoint:
    """Fit the phases on train, choose each one's epoch and the temperature on valid; calibration and test are not read.

    Writes weights.safetensors and history.json, whose rows say their phase where there are several. What a killed run left
    in `out` is taken up, bit for bit.
    """
    import torch

    from components.checkpoints import assemble, save_weights

    check(config, root)
    torch.set_num_threads(num_threads)
    backbone: Backbone = plugins.load("backbones", config.backbone, dict(config.backbone_settings))
    task: Task = plugins.load("tasks", config.task, dict(config.task_settings))
    with torch.random.fork_rng():
        torch.manual_seed(config.all_phases[0].fit.seed)
        classes = task.classes(splits.record.classes)
        model = assemble(backbone, task, len(classes))
    local = local_weights(config, root)
    if config.weights != "random":
        given = from_safetensors(local) if local else backbone.pretrained(config.weights, cache=cache)
        try:
            model.backbone.load_state_dict(given)
        except RuntimeError as error:
            raise WeightsUnavailable(
                f"{config.weights} does not fit backbone {config.backbone!r}: {str(error).splitlines()[0]}"
            ) from error
    weights_digest = sha256_file(local) if local else ""
    history: list[dict[str, float]] = []
    for number, phase in enumerate(config.all_phases, 1):
        identity = sha256_text(canonical_json([config.to_json(), weights_digest, splits.record.digest(), number]))
        numbered = functools.partial(_numbered, before=len(history), phase=number if len(config.all_phases) > 1 else None)
        label = f"phase {number}, " if len(config.all_phases) > 1 else ""
        arguments: dict[str, Any] = {
            "checkpointing": Checkpointing(out, identity, number),
            "hooks": (MetricLogging(sink or NullSink(), numbered), ProgressReporting(progress, task.headline, label)),
            "setting": f"{config.place(number)}.fit",
        }
        # A phase that a killed run had finished is taken up from its checkpoint without a step.
        if phase.trains == "head":
            sets = _features(model, splits, data, config, backbone, task, cache, num_threads, progress)
            result = fit(model.head, _of_head, task, *sets, phase.fit, **arguments)
            logits = predict(model.head, _of_head, sets[1].inputs, phase.fit.batch_size)
        else:
            sets = _pixels(splits, data, backbone.preprocessing, task)
            augment = phase.augmentation if phase.augmentation.active else None
            result = fit(model, _of_images, task, *sets, phase.fit, augment=augment, **arguments)
            logits = predict(model, _of_images, sets[1].inputs, phase.fit.batch_size)
        best_epoch = len(history) + result.best_epoch
        history += map(numbered, result.history)
    labels = sets[1].targets.numpy()
    answers = logits.numpy()
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
    )


def _numbered(row: dict[str, float], *, before: int, phase: int | None) -> dict[str, float]:
    """A row of a phase's history as a row of the training's: epochs are numbered through."""
    found = {**row, "epoch": before + row["epoch"]}
    return found if phase is None else {**found, "phase": float(phase)}


def _of_images(module: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = module(images)[0]
    return logits


def _of_head(module: torch.nn.Module, features: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = module(features)
    return logits


def _features(
    model: ImageModel,
    splits: Stored[Splits],
    data: Path,
    config: TrainingConfig,
    backbone: Backbone,
    task: Task,
    cache: Path,
    num_threads: int,
    progress: Progress,
) -> tuple[Examples, Examples]:
    """What the backbone as it is now makes of the train and the valid split."""
    import torch

    state = model.backbone.state_dict()

    def found(name: SplitName) -> Examples:
        table = rows(splits, name)
        paths = [data / path for path in table["path"]]
        features = embed(
            list(table["picture"]),
            paths,
            config.backbone,
            backbone,
            state,
            cache=cache,
            num_threads=num_threads,
            progress=progress,
        )
        return Examples(torch.from_numpy(features), _targets(table, splits, task))

    return found("train"), found("valid")


def _targets(table: pd.DataFrame, splits: Stored[Splits], task: Task) -> torch.Tensor:
    import torch

    return torch.from_numpy(task.targets(list(table["label"]), task.classes(splits.record.classes)))


def _pixels(splits: Stored[Splits], data: Path, preprocessing: Preprocessing, task: Task) -> tuple[Examples, Examples]:
    """The images of the train and the valid split."""
    import torch

    def found(name: SplitName) -> Examples:
        table = rows(splits, name)
        shape = (len(table), preprocessing.height, preprocessing.width, preprocessing.channels)
        images = np.empty(shape, dtype=np.uint8)
        done = 0
        for batch in batches([data / path for path in table["path"]], preprocessing, batch_size=256):
            images[done : done + len(batch)] = batch
            done += len(batch)
        return Examples(torch.from_numpy(images), _targets(table, splits, task))

    return found("train"), found("valid")
