"""MixUp (Zhang et al. 2017): each example and another of its batch, added up by shares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from components.augmentations._kinds import OfBatches
from components.augmentations._share import drawn

if TYPE_CHECKING:
    import torch


class Augmentation(OfBatches):
    """One share a batch, of pictures, maps or features alike."""

    alpha: float = Field(default=0.2, gt=0, le=8)
    """Of the Beta distribution that the share is drawn from; small for mostly one example."""

    @property
    def needs_space(self) -> bool:
        return False

    def mix(
        self, inputs: torch.Tensor, shares: torch.Tensor, generator: torch.Generator, *, channels_last: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs of any shape (n, ...) as float, and the shares of classes of what they are made of."""
        import torch

        own = drawn(self.alpha, generator)
        other = torch.randperm(len(inputs), generator=generator)
        inputs = inputs.float()
        return inputs.lerp(inputs[other], 1 - own), shares.lerp(shares[other], 1 - own)
