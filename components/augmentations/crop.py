"""A random piece of the picture, resized to the whole (Inception's crop, Szegedy et al. 2015)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from components.augmentations._drawn import each
from components.augmentations._kinds import OfPictures

if TYPE_CHECKING:
    import torch


class Augmentation(OfPictures):
    """RandomResizedCrop of torchvision."""

    least_share: float = Field(default=0.3, gt=0, le=1)
    """The least share of the picture's area that is kept."""
    ratio: float = Field(default=4 / 3, ge=1, le=4)
    """The piece is at most so many times as wide as high, or as high as wide."""

    def change(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """uint8 (n, h, w, c) to the same shape."""
        from torchvision.transforms import v2

        size = (int(images.shape[1]), int(images.shape[2]))
        ratios = (1 / self.ratio, self.ratio)
        return each(images, generator, v2.RandomResizedCrop(size, (self.least_share, 1.0), ratios, antialias=True))
