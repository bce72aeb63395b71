"""A draw of its own for every picture: torchvision's transforms draw from torch's global generator alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_LOCK = threading.Lock()
"""The global generator is one for all threads: two that change pictures at once would draw from each other's seeds."""


def each(
    images: torch.Tensor, generator: torch.Generator, transform: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """uint8 images (n, h, w, c), each changed by `transform` of (c, h, w); the global generator stays as it was."""
    import torch

    found = []
    with _LOCK, torch.random.fork_rng(devices=[]):
        for image in images:
            # torch.manual_seed would seed the generators of GPUs too, and those are not put back.
            torch.default_generator.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
            found.append(transform(image.permute(2, 0, 1)).permute(1, 2, 0))
    return torch.stack(found).contiguous()
