"""Training: Splits -> Checkpoint. From scratch, or a new head on a frozen, pretrained backbone with cached features.

The temperature of the answer is fitted on the valid split (Guo et al. 2017).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from components import plugins
from components.contracts.data import SplitName, Splits
from components.contracts.errors import ConfigError, UnknownName, WeightsUnavailable
from components.contracts.families import Backbone, Task
from components.contracts.models import Checkpoint, Preprocessing
from components.contracts.progress import MetricSink, Progress, silent
from components.contracts.records import Record, Stored, canonical_json, sha256_text
from components.features import embed
from components.fitting import Examples, FitResult, FittingConfig, fit, predict, write_history
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


class TrainingConfig(Record):
    """Which network, from which weights, fitted how."""

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
    if config.mode == "frozen" and config.weights == "random":
        raise ConfigError(
            f"training.mode=frozen on random weights learns nothing; choose training.weights from: "
            f"{', '.join(backbone.weights_choices) or '<path>.safetensors'}"
        )
    if config.mode == "frozen" and config.augmentation.active:
        raise ConfigError("training.augmentation has no effect with mode=frozen: features are computed once; remove it")


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
    """Fit on train, choose the epoch and the temperature on valid; calibration and test are not read.

    Writes weights.safetensors and history.json. What a killed run left in `out` is taken up, bit for bit.
    """
    import torch

    from components.checkpoints import assemble, save_weights

    check(config, root)
    torch.set_num_threads(num_threads)
    backbone: Backbone = plugins.load("backbones", config.backbone, dict(config.backbone_settings))
    task: Task = plugins.load("tasks", config.task, dict(config.task_settings))
    with torch.random.fork_rng():
        torch.manual_seed(config.fit.seed)
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
    identity = sha256_text(canonical_json([config.to_json(), weights_digest, splits.record.digest()]))
    arguments: dict[str, Any] = {"identity": identity, "out": out, "sink": sink, "progress": progress}
    if config.mode == "frozen":
        result, logits, labels = _fit_head(model, splits, data, config, backbone, task, cache, num_threads, arguments)
    else:
        result, logits, labels = _fit_all(model, splits, data, config, backbone, task, arguments)
    answers = logits.numpy()
    temperature = task.fit_temperature(answers, labels)
    measured = task.metrics(answers, labels, temperature)
    write_history(result.history, out / "history.json")
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
        best_epoch=result.best_epoch,
        epochs=len(result.history),
        valid_metrics={name: estimate.value for name, estimate in measured.items()},
    )


def _fit_all(
    model: ImageModel,
    splits: Stored[Splits],
    data: Path,
    config: TrainingConfig,
    backbone: Backbone,
    task: Task,
    arguments: dict[str, Any],
) -> tuple[FitResult, torch.Tensor, np.ndarray[Any, np.dtype[np.int64]]]:
    def logits_of(module: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = module(images)[0]
        return logits

    train_set = _pixels(splits, "train", data, backbone.preprocessing, task)
    valid_set = _pixels(splits, "valid", data, backbone.preprocessing, task)
    augment = config.augmentation if config.augmentation.active else None
    result = fit(model, logits_of, task, train_set, valid_set, config.fit, augment=augment, **arguments)
    logits = predict(model, logits_of, valid_set.inputs, config.fit.batch_size)
    return result, logits, valid_set.targets.numpy()


def _fit_head(
    model: ImageModel,
    splits: Stored[Splits],
    data: Path,
    config: TrainingConfig,
    backbone: Backbone,
    task: Task,
    cache: Path,
    num_threads: int,
    arguments: dict[str, Any],
) -> tuple[FitResult, torch.Tensor, np.ndarray[Any, np.dtype[np.int64]]]:
    import torch

    state = model.backbone.state_dict()
    sets: list[Examples] = []
    for name in ("train", "valid"):
        table = rows(splits, name)
        features = embed(
            list(table["picture"]),
            [data / path for path in table["path"]],
            config.backbone,
            backbone,
            state,
            cache=cache,
            num_threads=num_threads,
            progress=arguments["progress"],
        )
        sets.append(Examples(torch.from_numpy(features), _targets(table, splits, task)))
    train_set, valid_set = sets

    def logits_of(module: torch.nn.Module, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = module(features)
        return logits

    result = fit(model.head, logits_of, task, train_set, valid_set, config.fit, **arguments)
    logits = predict(model.head, logits_of, valid_set.inputs, config.fit.batch_size)
    return result, logits, valid_set.targets.numpy()


def _targets(table: pd.DataFrame, splits: Stored[Splits], task: Task) -> torch.Tensor:
    import torch

    return torch.from_numpy(task.targets(list(table["label"]), task.classes(splits.record.classes)))


def _pixels(splits: Stored[Splits], name: SplitName, data: Path, preprocessing: Preprocessing, task: Task) -> Examples:
    import torch

    table = rows(splits, name)
    shape = (len(table), preprocessing.height, preprocessing.width, preprocessing.channels)
    images = np.empty(shape, dtype=np.uint8)
    done = 0
    for batch in batches([data / path for path in table["path"]], preprocessing, batch_size=256):
        images[done : done + len(batch)] = batch
        done += len(batch)
    return Examples(torch.from_numpy(images), _targets(table, splits, task))
