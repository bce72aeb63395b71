"""A Gaussian blur of random width."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from components.augmentations._drawn import each
from components.augmentations._kinds import OfPictures

if TYPE_CHECKING:
    import torch


class Augmentation(OfPictures):
    """GaussianBlur of torchvision, for a share of the pictures."""

    probability: float = Field(default=0.5, gt=0, le=1)
    most_sigma: float = Field(default=2.0, gt=0.1, le=20)
    """The largest standard deviation, in pixels; the least is 0.1."""

    def change(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """uint8 (n, h, w, c) to the same shape."""
        from torchvision.transforms import v2

        size = 2 * max(1, round(2 * self.most_sigma)) + 1
        size = min(size, 2 * ((min(int(images.shape[1]), int(images.shape[2])) - 1) // 2) + 1)
        blur = v2.GaussianBlur(size, (0.1, self.most_sigma))
        return each(images, generator, v2.RandomApply([blur], p=self.probability))
