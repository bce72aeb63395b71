"""A draw of its own for every picture: torchvision's transforms draw from torch's global generator alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def each(
    images: torch.Tensor, generator: torch.Generator, transform: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """uint8 images (n, h, w, c), each changed by `transform` of (c, h, w); the global generator stays as it was."""
    import torch

    found = []
    with torch.random.fork_rng(devices=[]):
        for image in images:
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
            found.append(transform(image.permute(2, 0, 1)).permute(1, 2, 0))
    return torch.stack(found).contiguous()
