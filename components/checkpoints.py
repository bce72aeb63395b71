"""Checkpoint record + weights file <-> the torch module they describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from components import plugins
from components.contracts.errors import CheckpointMismatch, ConfigError, WeightsUnavailable
from components.contracts.families import Backbone, Task
from components.contracts.models import Checkpoint, Preprocessing
from components.contracts.records import FileDigest, Stored
from components.store import describe
from components.weights import from_safetensors, packed

WEIGHTS = "weights.safetensors"


class ImageModel(nn.Module):
    """uint8 images (n, h, w, c) to logits (n, classes) and embeddings (n, embedding_dim).

    Scaling to the backbone's input range is part of the module, so it is part of every engine's graph.
    """

    mean: torch.Tensor
    std: torch.Tensor
    embedding_dim: int

    def __init__(self, backbone: nn.Module, head: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.embedding_dim = 0
        """Of one that was assembled."""
        shape = (1, preprocessing.channels, 1, 1)
        self.register_buffer("mean", torch.tensor(preprocessing.mean).reshape(shape) * 255.0, persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).reshape(shape) * 255.0, persistent=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Cast before transposing: TensorRT moves no uint8 tensors.
        return self.of_planes(images.float().permute(0, 3, 1, 2))

    def of_planes(self, planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of float planes (n, c, h, w) that hold the values 0 to 255."""
        embedding = self.backbone((planes - self.mean) / self.std)
        return self.head(embedding), embedding


class OfPlanes(nn.Module):
    """An ImageModel that takes planes, for runtimes that take apart an image by themselves."""

    def __init__(self, model: ImageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.of_planes(planes)


def assemble(backbone: Backbone, task: Task, num_classes: int) -> ImageModel:
    """An untrained module of these parts."""
    model = ImageModel(backbone.build(), task.head(backbone.embedding_dim, num_classes), backbone.preprocessing)
    model.embedding_dim = backbone.embedding_dim
    return model


def shapes_of(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by name."""
    return {name: tuple(value.shape) for name, value in state.items()}


def reshape(module: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give tensors of a module these smaller shapes, and its layers the channels that follow from them; values are lost.

    Raises CheckpointMismatch for a tensor that the module does not have, or not with so many dimensions of such sizes.
    """
    own = module.state_dict(keep_vars=True)
    layers: dict[str, nn.Module] = {}
    for name, shape in shapes.items():
        found = own.get(name)
        if found is None:
            raise CheckpointMismatch(f"{name} is no tensor of this network")
        if len(shape) != found.ndim or any(not 1 <= new <= old for new, old in zip(shape, found.shape, strict=True)):
            raise CheckpointMismatch(f"{name} cannot have the shape {tuple(shape)}: this network has {tuple(found.shape)}")
        layer, _, attribute = name.rpartition(".")
        layers[layer] = module.get_submodule(layer)
        empty = torch.zeros(*shape, dtype=found.dtype)
        setattr(layers[layer], attribute, nn.Parameter(empty) if isinstance(found, nn.Parameter) else empty)
    for changed in layers.values():
        _count_channels(changed)


def _count_channels(layer: nn.Module) -> None:
    """Let a layer say as many channels as its tensors have; other kinds of layers are their tensors alone."""
    if isinstance(layer, nn.Conv2d):
        outputs, inputs = layer.weight.shape[:2]
        if layer.groups == layer.in_channels > 1:  # each input has outputs of its own, and takes them with it
            layer.groups = outputs * layer.groups // layer.out_channels
        layer.in_channels, layer.out_channels = inputs * layer.groups, outputs
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
        layer.num_features = len(layer.weight if layer.weight is not None else layer.running_mean)
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(layer.weight.shape)
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = len(layer.weight)


def blocks(name: str, backbone: Backbone, module: nn.Module) -> list[nn.Module]:
    """The blocks of a backbone's module, first to last; applied one after the other they are the module.

    They share its parameters. Raises ConfigError where the backbone of this name does not know its blocks.
    """
    known = getattr(backbone, "blocks", None)
    found: list[nn.Module] = list(known(module)) if known is not None else []
    if len(found) < 2:
        raise ConfigError(
            f"the blocks of backbone {name!r} are not known, so its last ones cannot be trained alone; "
            f"choose trains: head or trains: all"
        )
    return found


def load_state(module: nn.Module, state: Mapping[str, torch.Tensor], refusal: str) -> None:
    """Put a state dict into a module that it is of.

    Raises CheckpointMismatch, which begins with `refusal` and names the first tensor that does not fit.
    """
    own = module.state_dict()
    # Files of before batch normalisation counted its batches have no such number, and nothing of ours reads it.
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    state = {**counters, **state}
    problems = [f"it holds no {name}" for name in own if name not in state]
    problems += [f"its {name} is no tensor of this network" for name in state if name not in own]
    problems += [
        f"its {name} has the shape {tuple(value.shape)}, expected {tuple(own[name].shape)}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    if problems:
        raise CheckpointMismatch(f"{refusal}: {problems[0]}")
    module.load_state_dict(state)


def reorder_answers(head: nn.Module, order: Sequence[int]) -> None:
    """Let a head answer about the same classes in another order: answer `i` is what answer `order[i]` was.

    Raises CheckpointMismatch for a head that does not end in one linear layer of as many answers.
    """
    last = next(reversed([layer for layer in head.modules() if isinstance(layer, nn.Linear)]), None)
    if last is None or last.out_features != len(order):
        raise CheckpointMismatch(
            f"the head ends in no linear layer of {len(order)} answers, so it cannot be told which answer is of which class"
        )
    with torch.no_grad():
        for parameter in last.parameters(recurse=False):
            parameter.copy_(parameter[list(order)].clone())


def save_weights(state: Mapping[str, torch.Tensor], *, out: Path, pack: bool = False) -> FileDigest:
    """Write weights.safetensors into `out`; with `pack`, tensors of many zeros without these."""
    plain = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(packed(plain) if pack else plain, out / WEIGHTS)
    return describe(out / WEIGHTS, within=out)


def restore(checkpoint: Stored[Checkpoint]) -> ImageModel:
    """The trained module in evaluation mode, from a verified folder; raises CheckpointMismatch."""
    record = checkpoint.record
    backbone = plugins.load("backbones", record.backbone, dict(record.backbone_settings))
    model = assemble(backbone, plugins.load("tasks", record.task, dict(record.task_settings)), len(record.classes))
    told = f"{record.weights.name} does not fit backbone {record.backbone!r}"
    try:
        if record.optimised is not None and record.optimised.shapes:
            told += " with the channels that its record says were left"
            reshape(model, record.optimised.shapes)
            model.embedding_dim = record.embedding_dim
        load_state(model, from_safetensors(checkpoint.folder / record.weights.name), told)
    except (CheckpointMismatch, WeightsUnavailable) as error:
        raise CheckpointMismatch(f"{error}; train again") from None
    return model.eval()
