"""Saliency: which part of a picture an answer rests on, by Captum, from the trained network itself.

Grad-CAM (Selvaraju et al., 2017) of the last maps of the backbone; integrated gradients (Sundararajan et al., 2017) for a
network that has no maps. An engine gives no gradients, so it is the torch network that explains the engine's answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import nn

    from components.checkpoints import ImageModel

_STEPS = 16
"""Of integrated gradients."""
_BATCH = 8


def saliency(model: ImageModel, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], str]:
    """Maps (n, h, w) in [0, 1] of what speaks for the largest logit of uint8 images (n, h, w, c), and the method's name.

    A map without any such place is all zero.
    """
    import torch
    from captum.attr import IntegratedGradients, LayerAttribution, LayerGradCam

    model.eval()
    layer = last_maps(model, images[:1])

    def logits(planes: torch.Tensor) -> torch.Tensor:
        return model.of_planes(planes)[0]

    found = []
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        planes = torch.from_numpy(np.ascontiguousarray(batch)).float().permute(0, 3, 1, 2).requires_grad_()
        with torch.no_grad():
            target = logits(planes).argmax(dim=1)
        if layer is not None:
            maps = LayerGradCam(logits, layer).attribute(planes, target=target, relu_attributions=True)
            given = LayerAttribution.interpolate(maps, (planes.shape[2], planes.shape[3]), "bilinear")[:, 0]
        else:
            gradients = IntegratedGradients(logits).attribute(planes, target=target, n_steps=_STEPS)
            given = gradients.sum(dim=1)
        found.append(given.detach().numpy().astype(np.float32))
    whole = np.concatenate(found)
    # An outlier of one pixel would leave the rest of a map of gradients black.
    highest = np.quantile(whole, 0.99 if layer is None else 1.0, axis=(1, 2), keepdims=True)
    scaled: npt.NDArray[np.float32] = np.clip(whole / np.maximum(highest, 1e-12), 0.0, 1.0)
    return np.where(np.isfinite(scaled), scaled, 0.0).astype(np.float32), "Grad-CAM" if layer else "integrated gradients"


def last_maps(model: ImageModel, images: npt.NDArray[np.uint8]) -> nn.Module | None:
    """The last module of the backbone that gives maps (n, c, h, w) of more than one place; None where none does.

    One in the first half of the network is none either: transformers begin with maps and go on without.
    """
    import torch

    seen: list[tuple[int, nn.Module]] = []
    count = 0

    def look(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal count
        count += 1
        # Maps with channels last, as some transformers have them, are none: their places would be taken for channels.
        is_maps = isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[1] >= max(output.shape[2:])
        if is_maps and min(output.shape[2:]) > 1:
            seen.append((count, module))

    hooks = [module.register_forward_hook(look) for module in model.backbone.modules() if not list(module.children())]
    try:
        with torch.no_grad():
            model(torch.from_numpy(np.ascontiguousarray(images)))
    finally:
        for hook in hooks:
            hook.remove()
    return seen[-1][1] if seen and seen[-1][0] >= count / 2 else None


def overlaid(image: npt.NDArray[np.uint8], strength: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """A picture (h, w, 1 or 3) in grey with its map (h, w) over it in colour, (h, w, 3)."""
    from matplotlib import colormaps

    grey = np.repeat(image.astype(np.float32).mean(axis=2, keepdims=True), 3, axis=2)
    colours = np.asarray(colormaps["inferno"](strength))[..., :3] * 255.0
    share = 0.65 * strength[..., None]
    mixed: npt.NDArray[np.uint8] = (grey * (1 - share) + colours * share).clip(0, 255).astype(np.uint8)
    return mixed
