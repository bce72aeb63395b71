"""A small convolutional network for small pictures, trained from scratch.

Convolutions with batch norm and ReLU, max pooling twice, then one linear layer over the flattened map: the plainest network
that int8 quantisation and every export target handle without special cases.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.errors import WeightsUnavailable
from components.contracts.models import Preprocessing

if TYPE_CHECKING:
    import torch


class Backbone(BaseModel):
    """About 234,000 parameters at width 16 and 28 pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = Field(default=28, ge=16, le=128)
    channels: Literal[1, 3] = 1
    width: int = Field(default=16, ge=4, le=128)
    """Channels of the first stage; doubled after each pooling."""
    embedding_dim: int = Field(default=64, ge=2, le=1024)
    dropout: float = Field(default=0.3, ge=0, lt=1)

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(
            channels=self.channels,
            height=self.image_size,
            width=self.image_size,
            resize_shortest=self.image_size,
            interpolation="bilinear",
            mean=(0.5,) * self.channels,
            std=(0.5,) * self.channels,
        )

    @property
    def weights_choices(self) -> tuple[str, ...]:
        return ()

    def build(self) -> torch.nn.Module:
        from torch import nn

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        w, side = self.width, self.image_size // 4
        return nn.Sequential(
            # Pooled before normalised: the full-resolution map is the expensive one on a CPU.
            nn.Conv2d(self.channels, w, 5, padding=2, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(w),
            nn.ReLU(),
            *block(w, 2 * w),
            *block(2 * w, 2 * w),
            nn.MaxPool2d(2),
            *block(2 * w, 4 * w),
            nn.Flatten(),
            nn.Dropout(self.dropout),
            nn.Linear(4 * w * side * side, self.embedding_dim),
            nn.ReLU(),
        )

    def blocks(self, module: torch.nn.Module) -> list[torch.nn.Module]:
        """The first convolution, two at half the resolution, one at a quarter, and what is linear with it."""
        from torch import nn

        assert isinstance(module, nn.Sequential)
        return [module[:4], module[4:7], module[7:11], module[11:]]

    def pretrained(self, weights: str, *, cache: Path) -> dict[str, torch.Tensor]:
        raise WeightsUnavailable(f"small_cnn has no pretrained weights ({weights!r}); set training.weights=random")
