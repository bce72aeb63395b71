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
    views, changer = phase.cached_views()[1:], phase.changer()
    frozen = phase.trains != "all"
    generator = torch.Generator().manual_seed(phase.fit.seed)
    found = []
    for number in range(min(num_draws, len(views)) if frozen and changer else num_draws):
        changed = torch.from_numpy(views[number].change(images, pictures) if frozen and changer else images)
        if changer is not None and not frozen:
            changed = changer(changed, generator)
        if mixer is not None:
            changed, _ = mixer(changed, targets, generator)
        found.append(changed.float().round().clamp(0, 255).to(torch.uint8).numpy())
    return found
