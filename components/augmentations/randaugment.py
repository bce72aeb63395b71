"""A few random operations of one strength (Cubuk et al. 2019)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from components.augmentations._drawn import each
from components.augmentations._kinds import OfPictures

if TYPE_CHECKING:
    import torch


class Augmentation(OfPictures):
    """RandAugment of torchvision."""

    operations: int = Field(default=2, ge=1, le=8)
    magnitude: int = Field(default=9, ge=0, le=30)

    def change(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """uint8 (n, h, w, c) to the same shape."""
        from torchvision.transforms import v2

        return each(images, generator, v2.RandAugment(self.operations, self.magnitude))
