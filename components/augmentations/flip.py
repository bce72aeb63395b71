"""A mirror image, for a share of the pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from components.augmentations._kinds import OfPictures

if TYPE_CHECKING:
    import torch


class Augmentation(OfPictures):
    """Left and right change places, or top and bottom."""

    probability: float = Field(default=0.5, gt=0, le=1)
    direction: Literal["horizontal", "vertical"] = "horizontal"

    def change(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """uint8 (n, h, w, c) to the same shape."""
        import torch

        chosen = (torch.rand(len(images), generator=generator) < self.probability).to(images.device)
        mirrored = images.flip(2 if self.direction == "horizontal" else 1)
        return torch.where(chosen[:, None, None, None], mirrored, images)
