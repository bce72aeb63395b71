"""One random operation of random strength (Mueller & Hutter 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from components.augmentations._drawn import each
from components.augmentations._kinds import OfPictures

if TYPE_CHECKING:
    import torch


class Augmentation(OfPictures):
    """TrivialAugmentWide of torchvision; it has no settings."""

    def change(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """uint8 (n, h, w, c) to the same shape."""
        from torchvision.transforms import v2

        return each(images, generator, v2.TrivialAugmentWide())
