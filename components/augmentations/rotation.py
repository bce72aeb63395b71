"""A rotation by a random angle; the corners repeat no pixel and are black."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from components.augmentations._drawn import each
from components.augmentations._kinds import OfPictures

if TYPE_CHECKING:
    import torch


class Augmentation(OfPictures):
    """RandomRotation of torchvision, bilinear."""

    degrees: float = Field(default=10.0, gt=0, le=180)
    """The largest angle, either way."""

    def change(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """uint8 (n, h, w, c) to the same shape."""
        from torchvision.transforms import v2

        bilinear = v2.InterpolationMode.BILINEAR
        return each(images, generator, v2.RandomRotation((-self.degrees, self.degrees), interpolation=bilinear))
