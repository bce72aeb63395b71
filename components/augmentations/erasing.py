"""A random box of the picture is filled with grey (Zhong et al. 2017)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from components.augmentations._drawn import each
from components.augmentations._kinds import OfPictures

if TYPE_CHECKING:
    import torch


class Augmentation(OfPictures):
    """RandomErasing of torchvision."""

    probability: float = Field(default=0.5, gt=0, le=1)
    most_share: float = Field(default=0.33, gt=0.02, le=1)
    """The largest share of the picture's area; the least is 0.02."""

    def change(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """uint8 (n, h, w, c) to the same shape."""
        from torchvision.transforms import v2

        return each(images, generator, v2.RandomErasing(self.probability, (0.02, self.most_share), value=128))
