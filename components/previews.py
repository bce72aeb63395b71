"""Draws of a phase's augmentations, for a person who looks at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from components.phases import Phase


def draws(
    phase: Phase, images: npt.NDArray[np.uint8], labels: Sequence[str], pictures: Sequence[str], *, num_draws: int
) -> list[npt.NDArray[np.uint8]]:
    """What becomes of images (n, h, w, c) of these labels and picture digests: an array of that shape for each draw.

    Cached views are those that a training takes, and no more than there are; other draws are some of many.
    """
    import torch

    classes = sorted(set(labels))
    targets = torch.tensor([classes.index(label) for label in labels])
    mixer = phase.mixer(len(classes), channels_last=True)
    frozen = phase.trains != "all"
    generator = torch.Generator().manual_seed(phase.fit.seed)
    found = []
    for number in range(1, 1 + (min(num_draws, phase.views - 1) if frozen and phase.changes else num_draws)):
        if frozen:
            changed = torch.from_numpy(phase.view(number if phase.changes else 0, images, pictures))
        else:
            changed = phase.change(torch.from_numpy(images), generator)
        if mixer is not None:
            changed, _ = mixer(changed, targets, generator)
        found.append(changed.float().round().clamp(0, 255).to(torch.uint8).numpy())
    return found
