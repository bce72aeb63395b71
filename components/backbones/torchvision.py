"""Any classification architecture of torchvision by its name, without its classifier; weights are downloaded once.

A network with hidden layers in its classifier (AlexNet, VGG) keeps them: its features are what the last linear layer takes.
"""

from __future__ import annotations

import difflib
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from components.contracts.errors import ConfigError, WeightsUnavailable
from components.contracts.models import Preprocessing

if TYPE_CHECKING:
    import torch

_LEFT_OUT = {"googlenet", "inception_v3"}
"""They train with a second classifier half-way, which no other network has."""


class Backbone(BaseModel):
    """For example `architecture: resnet50`, with `training.weights: IMAGENET1K_V2`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str = "resnet50"
    """As torchvision names it, such as alexnet, vgg19, efficientnet_b0, mobilenet_v3_large, vit_b_16, swin_t."""
    inputs: str = "DEFAULT"
    """The weights whose input contract is followed: size, crop, interpolation, mean and std."""
    image_size: int | None = Field(default=None, ge=32, le=1024)
    """Side of the crop in pixels; that of the weights where it is not said."""

    @field_validator("architecture")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in _architectures():
            near = difflib.get_close_matches(name, _architectures(), n=5, cutoff=0.5)
            raise ValueError(
                f"torchvision has no classification architecture {name!r}; near it: {', '.join(near) or '(none)'}; "
                f"all are in torchvision.models"
            )
        return name

    @model_validator(mode="after")
    def _of_its_weights(self) -> Backbone:
        if self.inputs not in (valid := ["DEFAULT", *_weights(self.architecture)]):
            raise ValueError(f"inputs: {self.architecture} has no weights {self.inputs!r}; valid: {', '.join(valid)}")
        return self

    @property
    def embedding_dim(self) -> int:
        return _cut(self.architecture)[1]

    @property
    def preprocessing(self) -> Preprocessing:
        preset = _preset(self.architecture, self.inputs)
        crop = self.image_size or preset.crop_size[0]
        return Preprocessing(
            channels=3,
            height=crop,
            width=crop,
            resize_shortest=max(crop, round(crop * preset.resize_size[0] / preset.crop_size[0])),
            interpolation="bicubic" if preset.interpolation.value == "bicubic" else "bilinear",
            mean=tuple(preset.mean),
            std=tuple(preset.std),
        )

    @property
    def weights_choices(self) -> tuple[str, ...]:
        return tuple(_weights(self.architecture))

    def build(self) -> torch.nn.Module:
        """Normalised float images (n, 3, h, w) to features (n, embedding_dim)."""
        return _headless(self.architecture)

    def blocks(self, module: torch.nn.Module) -> list[torch.nn.Module]:
        """The network's stages or layers; [] where its kind is not known."""
        from components.backbones._division import divided

        return divided(module)

    def pretrained(self, weights: str, *, cache: Path) -> dict[str, torch.Tensor]:
        """The weights of this name, downloaded once; the file's name carries the digest that is checked."""
        from components.weights import download, from_pickle

        wanted, followed = _preset(self.architecture, weights), _preset(self.architecture, self.inputs)
        if vars(wanted) != vars(followed):
            raise ConfigError(
                f"training.weights: {weights} of {self.architecture} were trained on other inputs than "
                f"{self.inputs}; set training.backbone_settings.inputs={weights}"
            )
        url = _weights(self.architecture)[weights].url
        sha256 = url.rsplit("-", 1)[-1].removesuffix(".pth")
        state = from_pickle(download(url, sha256=sha256, cache=cache), sha256=sha256, cache=cache)
        classifier = _cut(self.architecture)[0]
        # Weights of DenseNet are from before torch's names had no dots.
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name): value for name, value in state.items()}
        found = {name: value for name, value in state.items() if not name.startswith(f"{classifier}.")}
        if len(found) == len(state):
            raise WeightsUnavailable(f"{url} holds no {classifier} of {self.architecture}; choose other weights")
        return found


@functools.cache
def _architectures() -> tuple[str, ...]:
    from torchvision import models

    return tuple(name for name in models.list_models(module=models) if name not in _LEFT_OUT)


def _weights(architecture: str) -> dict[str, Any]:
    """The weights of an architecture by name, those on whole ImageNet alone."""
    from torchvision.models import get_model_weights

    return {weights.name: weights for weights in get_model_weights(architecture)}


def _preset(architecture: str, name: str) -> Any:
    from torchvision.models import get_model_weights

    return get_model_weights(architecture)[name].transforms()


@functools.cache
def _cut(architecture: str) -> tuple[str, int]:
    """Name of the layer that answers for ImageNet's classes, and the number of features that it takes."""
    import torch
    from torch import nn
    from torchvision.models import get_model

    try:
        with torch.device("meta"):
            module = get_model(architecture, weights=None)
    except NotImplementedError:
        # RegNet reads its widths from tensors while it is made. What it draws must not move the weights of a seeded run.
        with torch.random.fork_rng(devices=[]):
            module = get_model(architecture, weights=None)
    found = [
        (name, layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)
        for name, layer in module.named_modules()
        if (isinstance(layer, nn.Linear) and layer.out_features == 1000)
        or (isinstance(layer, nn.Conv2d) and layer.out_channels == 1000)
    ]
    return found[-1]


def _headless(architecture: str) -> torch.nn.Module:
    from torch import nn
    from torchvision.models import get_model

    module: nn.Module = get_model(architecture, weights=None)
    parent, _, name = _cut(architecture)[0].rpartition(".")
    setattr(module.get_submodule(parent) if parent else module, name, nn.Identity())
    return module
