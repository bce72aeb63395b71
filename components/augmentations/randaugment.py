"""A few random operations of one strength (Cubuk et al. 2019)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from components.augmentations._drawn import each

if TYPE_CHECKING:
    import torch


class Augmentation(BaseModel):
    """RandAugment of torchvision."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    operations: int = Field(default=2, ge=1, le=8)
    magnitude: int = Field(default=9, ge=0, le=30)

    @property
    def mixes(self) -> bool:
        return False

    @property
    def needs_space(self) -> bool:
        return True

    def change(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """uint8 (n, h, w, c) to the same shape."""
        from torchvision.transforms import v2

        return each(images, generator, v2.RandAugment(self.operations, self.magnitude))

    def mix(
        self, inputs: torch.Tensor, shares: torch.Tensor, generator: torch.Generator, *, channels_last: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch as it is."""
        return inputs, shares
