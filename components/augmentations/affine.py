"""One random affine map of each picture: rotation, shift, zoom, shear and mirror; borders repeat."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from components.augmentations._kinds import OfPictures

if TYPE_CHECKING:
    import torch


class Augmentation(OfPictures):
    """Bilinear; a setting of zero leaves that part of the map out."""

    rotate_degrees: float = Field(default=10.0, ge=0, le=180)
    """The largest angle, either way."""
    translate: float = Field(default=0.1, ge=0, le=0.5)
    """Largest shift as a share of the side."""
    scale: float = Field(default=0.1, ge=0, le=0.5)
    shear: float = Field(default=0.0, ge=0, le=0.5)
    horizontal_flip: bool = False

    def change(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """uint8 (n, h, w, c) to the same shape."""
        import torch
        from torch.nn import functional

        def uniform(limit: float) -> torch.Tensor:
            return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

        angle = uniform(math.radians(self.rotate_degrees))
        zoom, shear = 1 + uniform(self.scale), uniform(self.shear)
        mirror = torch.ones(len(images))
        if self.horizontal_flip:
            mirror = (torch.rand(len(images), generator=generator) < 0.5).float() * 2 - 1
        cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        rows_xy = torch.stack(
            [
                torch.stack([cosine * mirror, (shear - sine), uniform(2 * self.translate)], dim=1),
                torch.stack([sine * mirror, cosine, uniform(2 * self.translate)], dim=1),
            ],
            dim=1,
        ).to(images.device)
        planes = images.permute(0, 3, 1, 2).float()
        grid = functional.affine_grid(rows_xy, list(planes.shape), align_corners=False)
        moved = functional.grid_sample(planes, grid, padding_mode="border", align_corners=False)
        return moved.round().to(torch.uint8).permute(0, 2, 3, 1)
