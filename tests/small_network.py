"""A small network with its graph and pictures, whose third convolution int8 harms so much that nothing of it is left."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from shapes import KINDS, picture

from components import plugins
from components.checkpoints import ImageModel, assemble, save_weights
from components.contracts.families import Backbone, ExportRequest, PassRequest, Task
from components.contracts.models import Checkpoint, Engine, Precision
from components.contracts.records import FileDigest, Stored
from components.graphs import to_onnx
from components.intervals import paired_difference
from components.network_size import network_size
from components.store import describe

NETWORK: dict[str, bool | int | float | str] = {"image_size": 16, "width": 8, "embedding_dim": 16}


@dataclass(frozen=True)
class SmallNetwork:
    """The module answers every picture rightly: targets are its own answers."""

    checkpoint: Stored[Checkpoint]
    module: ImageModel
    graph: Path
    images: npt.NDArray[np.uint8]
    targets: npt.NDArray[Any]
    task: Task

    def request(self, precision: Precision, graph: Path | None = None) -> ExportRequest:
        """Half of the pictures are for calibration, the others valid."""
        half = len(self.images) // 2
        return ExportRequest(
            self.checkpoint,
            graph or self.graph,
            precision,
            lambda: iter([self.images[:half]]),
            lambda: iter([(self.images[half:], self.targets[half:])]),
            self.task,
        )

    def engine(self, target: str, precision: Precision, entry: str, folder: Path) -> Stored[Engine]:
        """What a target wrote into a folder, as it would be loaded."""
        record = self.checkpoint.record
        files = tuple(describe(path, within=folder) for path in sorted(folder.iterdir()))
        return Stored(
            Engine(
                name=f"{target}-{precision}",
                target=target,
                precision=precision,
                settings={},
                checkpoint_digest=record.digest(),
                files=files,
                entry=entry,
                preprocessing=record.preprocessing,
                classes=record.classes,
                embedding_dim=record.embedding_dim,
                temperature=1.0,
                runtime=target,
                built_for=(),
                facts={},
            ),
            folder,
        )


def small_network(folder: Path, *, harmed: bool = True) -> SmallNetwork:
    """Write weights.safetensors and model.onnx into `folder`.

    Where it is to be harmed, one channel of the second convolution's output is a thousand times larger than the others and
    the third convolution's weights make up for it: in float nothing changes, in 8 bits the others are all zero.
    """
    backbone: Backbone = plugins.load("backbones", "small_cnn", NETWORK)
    task: Task = plugins.load("tasks", "classification")
    images = np.stack([picture(KINDS[i % 3], i, side=16) for i in range(150)])[..., None]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = assemble(backbone, task, len(KINDS)).eval()
    with torch.no_grad():
        if harmed:
            parts: Any = module.backbone
            normalised, third = parts[5], parts[7]
            normalised.weight[1:] /= 1000
            normalised.bias[1:] /= 1000
            third.weight[:, 1:] *= 1000
        embeddings = module(torch.from_numpy(images))[1]
        (last,) = (part for part in module.head.modules() if isinstance(part, torch.nn.Linear))
        # The head alone is fitted, by least squares: what it answers is clear, and it takes no training.
        known = torch.cat([embeddings, torch.ones(len(images), 1)], dim=1)
        wanted = 8 * torch.nn.functional.one_hot(torch.arange(len(images)) % 3).float()
        found = torch.linalg.lstsq(known, wanted, driver="gelsd").solution
        last.weight.copy_(found[:-1].T)
        last.bias.copy_(found[-1])
        best, second = module(torch.from_numpy(images))[0].topk(2).values.unbind(dim=1)
        # Pictures of which the network is sure: others may turn without any harm.
        images = images[(best - second > 2).numpy()]
        targets = module(torch.from_numpy(images))[0].argmax(dim=1).numpy()
    record = record_of(module, "small_cnn", NETWORK, backbone, folder)
    to_onnx(module, record.preprocessing, folder / "model.onnx")
    return SmallNetwork(Stored(record, folder), module, folder / "model.onnx", images, targets, task)


def record_of(module: Any, name: str, settings: dict[str, Any], backbone: Backbone, folder: Path) -> Checkpoint:
    """The checkpoint of a module that tells the tests' classes apart; writes its weights into `folder`."""
    return Checkpoint(
        splits_digest="s" * 64,
        task="classification",
        task_settings={},
        backbone=name,
        backbone_settings=settings,
        preprocessing=backbone.preprocessing,
        classes=KINDS,
        embedding_dim=backbone.embedding_dim,
        weights=save_weights(module.state_dict(), out=folder),
        history=FileDigest(name="history.json", sha256="0" * 64, bytes=0),
        temperature=1.0,
        best_epoch=1,
        epochs=1,
        valid_metrics={},
    )


def pass_request(module: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor, **changes: Any) -> PassRequest:
    """What a pass may know of a module: these images are those that it trains on, finds ranges on and is decided on."""
    task: Task = plugins.load("tasks", "classification")
    batch = (images, targets)
    request = PassRequest(
        step=1,
        before=network_size(module, images[:1]),
        task=task,
        example=images[:1],
        images=lambda: iter([batch]),
        calibration=lambda: iter([images]),
        valid=lambda: iter([batch]),
        rehearsal=False,
        note=lambda _: None,
        compare=lambda _, right: paired_difference(right, np.ones_like(right)),
        enough=lambda: None,
    )
    return dataclasses.replace(request, **changes)


def pruned(
    module: ImageModel, name: str, settings: dict[str, Any], backbone: Backbone, folder: Path, *, share: float = 0.3
) -> Checkpoint:
    """The checkpoint of the module without a share of its parameters, taken away in place; writes its weights."""
    from components.checkpoints import shapes_of
    from components.contracts.models import Optimised

    whole, size = shapes_of(module.state_dict()), backbone.preprocessing
    example = torch.zeros(1, size.height, size.width, size.channels, dtype=torch.uint8)
    chosen = plugins.load("passes", "prune", {"share": share, "steps": 1, "importance": "magnitude"})
    chosen.begin(module, pass_request(module, example, torch.zeros(1, dtype=torch.int64)))
    record = record_of(module, name, settings, backbone, folder)
    shapes = {name: new for name, new in shapes_of(module.state_dict()).items() if whole[name] != new}
    with torch.no_grad():
        width = module(example)[1].shape[1]
    told = Optimised(made_of="m" * 64, passes=(), shapes=shapes, history=record.history)
    return record.model_copy(update={"embedding_dim": width, "optimised": told})
