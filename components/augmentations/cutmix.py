"""CutMix (Yun et al. 2019): a box of each example is filled from another one of its batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from components.augmentations._kinds import OfBatches
from components.augmentations._share import drawn
from components.contracts.errors import ConfigError

if TYPE_CHECKING:
    import torch


class Augmentation(OfBatches):
    """One box a batch, in pictures or in maps; the share of a class is the area that it has."""

    alpha: float = Field(default=1.0, gt=0, le=8)
    """Of the Beta distribution that the share of the area is drawn from; 1 for any share alike."""

    @property
    def needs_space(self) -> bool:
        return True

    def mix(
        self, inputs: torch.Tensor, shares: torch.Tensor, generator: torch.Generator, *, channels_last: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures (n, h, w, c) or maps (n, c, h, w) as float, and the shares of classes by area.

        Raises ConfigError for features (n, d).
        """
        import torch

        if inputs.ndim != 4:
            raise ConfigError(
                "cutmix cuts boxes out of pictures and maps, and features have neither height nor width; "
                "use mixup, or train more than the head"
            )

        rows, columns = (1, 2) if channels_last else (2, 3)
        height, width = inputs.shape[rows], inputs.shape[columns]
        side = math.sqrt(1 - drawn(self.alpha, generator))
        top, bottom = _span(height, side, generator)
        left, right = _span(width, side, generator)
        other = torch.randperm(len(inputs), generator=generator)
        found = inputs.float()
        box = found[other].narrow(rows, top, bottom - top).narrow(columns, left, right - left)
        found = found.clone()
        found.narrow(rows, top, bottom - top).narrow(columns, left, right - left).copy_(box)
        area = (bottom - top) * (right - left) / (height * width)
        return found, shares.lerp(shares[other], area)


def _span(length: int, share: float, generator: torch.Generator) -> tuple[int, int]:
    """Begin and end of a stretch about a random middle, cut off at the borders."""
    import torch

    middle, half = int(torch.randint(length, (1,), generator=generator)), share * length / 2
    return max(0, round(middle - half)), min(length, round(middle + half))
