"""Random brightness, contrast, saturation and hue; of grey pictures brightness and contrast alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from components.augmentations._drawn import each
from components.augmentations._kinds import OfPictures

if TYPE_CHECKING:
    import torch


class Augmentation(OfPictures):
    """ColorJitter of torchvision."""

    brightness: float = Field(default=0.2, ge=0, le=1)
    contrast: float = Field(default=0.2, ge=0, le=1)
    saturation: float = Field(default=0.2, ge=0, le=1)
    hue: float = Field(default=0.0, ge=0, le=0.5)

    def change(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """uint8 (n, h, w, c) to the same shape."""
        from torchvision.transforms import v2

        if images.shape[3] == 1:
            return each(images, generator, v2.ColorJitter(self.brightness, self.contrast))
        return each(images, generator, v2.ColorJitter(self.brightness, self.contrast, self.saturation, self.hue))
