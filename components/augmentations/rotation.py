"""A rotation by a random angle; the corners repeat no pixel and are black."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from components.augmentations._drawn import each

if TYPE_CHECKING:
    import torch


class Augmentation(BaseModel):
    """RandomRotation of torchvision, bilinear."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    degrees: float = Field(default=10.0, gt=0, le=180)
    """The largest angle, either way."""

    @property
    def mixes(self) -> bool:
        return False

    @property
    def needs_space(self) -> bool:
        return True

    def change(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """uint8 (n, h, w, c) to the same shape."""
        from torchvision.transforms import v2

        bilinear = v2.InterpolationMode.BILINEAR
        return each(images, generator, v2.RandomRotation((-self.degrees, self.degrees), interpolation=bilinear))

    def mix(
        self, inputs: torch.Tensor, shares: torch.Tensor, generator: torch.Generator, *, channels_last: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch as it is."""
        return inputs, shares
