"""ResNet-18 (He et al. 2015): 512-d features, architecture and downloadable ImageNet weights from torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.models import Preprocessing

if TYPE_CHECKING:
    import torch


class Backbone(BaseModel):
    """11.2 million parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = Field(default=224, ge=32, le=512)

    @property
    def embedding_dim(self) -> int:
        return 512

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(
            channels=3,
            height=self.image_size,
            width=self.image_size,
            resize_shortest=round(self.image_size * 256 / 224),
            interpolation="bilinear",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        )

    @property
    def weights_choices(self) -> tuple[str, ...]:
        return ("torchvision",)

    def build(self) -> torch.nn.Module:
        from torch import nn
        from torchvision.models import resnet18

        module: nn.Module = resnet18(weights=None)
        module.fc = nn.Identity()
        return module

    def blocks(self, module: torch.nn.Module) -> list[torch.nn.Module]:
        """The four groups of residual blocks, the first with the stem, the last with the pooling."""
        from torch import nn

        from components.backbones._parts import parts

        stem = parts(module, "conv1", "bn1", "relu", "maxpool")
        first, second, third, last = parts(module, "layer1", "layer2", "layer3", "layer4", whole=True)
        return [nn.Sequential(*stem, first), second, third, nn.Sequential(last, *parts(module, "avgpool"), nn.Flatten(1))]

    def pretrained(self, weights: str, *, cache: Path) -> dict[str, torch.Tensor]:
        """`torchvision`: IMAGENET1K_V1, downloaded once; the file name carries the digest that is checked."""
        from torchvision.models import ResNet18_Weights

        from components.weights import download, from_pickle

        url = ResNet18_Weights.IMAGENET1K_V1.url
        sha256 = url.rsplit("-", 1)[-1].removesuffix(".pth")
        state = from_pickle(download(url, sha256=sha256, cache=cache), sha256=sha256, cache=cache)
        return {name: value for name, value in state.items() if not name.startswith("fc.")}
