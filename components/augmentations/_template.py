"""An augmentation: a mirror image, for a share of the pictures.

Change the pictures your own way in `change`. `visionloop plugin check` tries it; a phase of a recipe names it among its
`augmentations`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch


class Augmentation(BaseModel):
    """Left and right change places, or top and bottom."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    probability: float = Field(default=0.5, gt=0, le=1)
    direction: Literal["horizontal", "vertical"] = "horizontal"

    @property
    def mixes(self) -> bool:
        return False

    @property
    def needs_space(self) -> bool:
        return True

    def change(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """uint8 (n, h, w, c) to the same shape."""
        import torch

        # The generator draws in memory, whatever device the images lie on.
        chosen = (torch.rand(len(images), generator=generator) < self.probability).to(images.device)
        mirrored = images.flip(2 if self.direction == "horizontal" else 1)
        return torch.where(chosen[:, None, None, None], mirrored, images)

    def mix(
        self, inputs: torch.Tensor, shares: torch.Tensor, generator: torch.Generator, *, channels_last: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch as it is."""
        return inputs, shares
