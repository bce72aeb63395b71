"""Random brightness, contrast, saturation and hue; of grey pictures brightness and contrast alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from components.augmentations._drawn import each

if TYPE_CHECKING:
    import torch


class Augmentation(BaseModel):
    """ColorJitter of torchvision."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    brightness: float = Field(default=0.2, ge=0, le=1)
    contrast: float = Field(default=0.2, ge=0, le=1)
    saturation: float = Field(default=0.2, ge=0, le=1)
    hue: float = Field(default=0.0, ge=0, le=0.5)

    @property
    def mixes(self) -> bool:
        return False

    @property
    def needs_space(self) -> bool:
        return True

    def change(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """uint8 (n, h, w, c) to the same shape."""
        from torchvision.transforms import v2

        if images.shape[3] == 1:
            return each(images, generator, v2.ColorJitter(self.brightness, self.contrast))
        return each(images, generator, v2.ColorJitter(self.brightness, self.contrast, self.saturation, self.hue))

    def mix(
        self, inputs: torch.Tensor, shares: torch.Tensor, generator: torch.Generator, *, channels_last: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch as it is."""
        return inputs, shares
