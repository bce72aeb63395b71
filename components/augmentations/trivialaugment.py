"""One random operation of random strength (Mueller & Hutter 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from components.augmentations._drawn import each

if TYPE_CHECKING:
    import torch


class Augmentation(BaseModel):
    """TrivialAugmentWide of torchvision; it has no settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def mixes(self) -> bool:
        return False

    @property
    def needs_space(self) -> bool:
        return True

    def change(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """uint8 (n, h, w, c) to the same shape."""
        from torchvision.transforms import v2

        return each(images, generator, v2.TrivialAugmentWide())

    def mix(
        self, inputs: torch.Tensor, shares: torch.Tensor, generator: torch.Generator, *, channels_last: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch as it is."""
        return inputs, shares
