"""Pictures as a worse camera would have taken them, and as one that is only held otherwise; the same on every machine.

Corruptions take away: the model may err more on them. They and their strengths are those of ImageNet-C (Hendrycks and
Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", 2019) at severities 1 and 3 of
its 5: what a camera does that ages, not one that is broken. Behaviours change nothing that is to be recognised, as long as
left and right mean nothing: the answer should stay. See infra/decisions/0026.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from components.contracts.errors import UnknownName
from components.images import decode

if TYPE_CHECKING:
    import torch

Pictures = npt.NDArray[np.uint8]
"""Prepared pictures (n, h, w, c) of 1 or 3 channels."""

CLEAN = "clean"
SEVERITIES = (1, 3)
CORRUPTIONS = ("noise", "defocus_blur", "darkness", "low_contrast", "jpeg")
BEHAVIOURS = ("flip", "shift", "reencoding")

_SIDE = 224
"""Shorter side in pixels of the pictures that ImageNet-C's strengths are for."""
_SHIFT = 0.04
"""Share of each side that a picture is shifted by."""


def severities(corruption: str) -> tuple[str, ...]:
    """The variants of one corruption, the weaker first."""
    return tuple(f"{corruption}-{severity}" for severity in SEVERITIES)


CORRUPTED = tuple(variant for corruption in CORRUPTIONS for variant in severities(corruption))
VARIANTS = (CLEAN, *CORRUPTED, *BEHAVIOURS)
"""Every way in which a picture is shown, the picture as it is first."""


def changed(pictures: Pictures, variant: str, digests: Sequence[str]) -> Pictures:
    """The pictures in one of `VARIANTS`, of the same shape. What is random of each is drawn from its digest alone.

    Raises UnknownName for another variant, ValueError for what are no prepared pictures.
    """
    if variant not in _CHANGES:
        raise UnknownName("variant of pictures", variant, VARIANTS)
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] not in (1, 3) or len(digests) != len(pictures):
        raise ValueError(
            f"expected uint8 pictures (n, h, w, 1 or 3) and n digests, got {pictures.dtype} {pictures.shape} and "
            f"{len(digests)}"
        )
    # torch takes no array that cannot be written to, which what Pillow decoded is.
    return _CHANGES[variant](np.require(pictures, requirements="W"), digests)


def _drawn(digest: str, what: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{what} {digest}".encode()).digest()[:16]))


def _clean(pictures: Pictures, _: Sequence[str]) -> Pictures:
    return pictures


def _noise(pictures: Pictures, digests: Sequence[str], *, sigma: float) -> Pictures:
    """Gaussian noise, `sigma` of full scale. torchvision's draws from one generator for the process and rounds to zero."""
    noisy = np.empty_like(pictures)
    for place, digest in enumerate(digests):
        drawn = _drawn(digest, "noise").standard_normal(pictures.shape[1:], dtype=np.float32)
        noisy[place] = np.clip(np.rint(pictures[place] + np.float32(255 * sigma) * drawn), 0, 255).astype(np.uint8)
    return noisy


def _defocus_blur(pictures: Pictures, _: Sequence[str], *, radius: float, aperture: float) -> Pictures:
    """The Gaussian of the same spread as ImageNet-C's disc of `radius` pixels of 224, smoothed by `aperture` pixels.

    A disc's standard deviation along one axis is half its radius. It scales with the picture, the aperture does not: it
    is that of CIFAR-10-C, whose pictures of 32 pixels a scaled disc alone would leave sharp.
    """
    import torch
    from torchvision.transforms.v2 import functional

    side = min(pictures.shape[1:3])
    sigma = math.hypot(radius / 2 * side / _SIDE, aperture)
    size = 2 * min(math.ceil(3 * sigma), side - 1) + 1
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    # Along one axis after the other: the same as a square of weights, in a fraction of the time.
    for kernel in ([size, 1], [1, size]):
        images = functional.gaussian_blur(images, kernel, [sigma, sigma])
    return _of_tensor(images.round_().clamp_(0, 255).to(torch.uint8))


def _darkness(pictures: Pictures, _: Sequence[str], *, stops: float) -> Pictures:
    """As many stops less light, in pictures that hold it by the power of 1 / 2.2."""
    from torchvision.transforms.v2 import functional

    return _of_tensor(functional.adjust_brightness(_to_tensor(pictures), 0.5 ** (stops / 2.2)))


def _low_contrast(pictures: Pictures, _: Sequence[str], *, left: float) -> Pictures:
    """This share of each pixel's difference from the picture's mean grey is left."""
    from torchvision.transforms.v2 import functional

    return _of_tensor(functional.adjust_contrast(_to_tensor(pictures), left))


def _jpeg(pictures: Pictures, _: Sequence[str], *, quality: int) -> Pictures:
    """By Pillow, and decoded as every picture is: torchvision's encoder is deprecated."""
    encoded = np.empty_like(pictures)
    for place, pixels in enumerate(pictures):
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "JPEG", quality=quality)
        encoded[place] = np.asarray(decode(file.getvalue()).stored).reshape(pixels.shape)
    return encoded


def _flip(pictures: Pictures, _: Sequence[str]) -> Pictures:
    return np.ascontiguousarray(pictures[:, :, ::-1])


def _shift(pictures: Pictures, digests: Sequence[str]) -> Pictures:
    """By 4 % of each side, at least a pixel, along both, one way or the other; the edge is repeated."""
    height, width = pictures.shape[1:3]
    down, right = (max(1, round(_SHIFT * side)) for side in (height, width))
    padded = np.pad(pictures, ((0, 0), (down, down), (right, right), (0, 0)), mode="edge")
    shifted = np.empty_like(pictures)
    for place, digest in enumerate(digests):
        top, left = _drawn(digest, "shift").choice(2, size=2) * (2 * down, 2 * right)
        shifted[place] = padded[place, top : top + height, left : left + width]
    return shifted


def _to_tensor(pictures: Pictures) -> torch.Tensor:
    import torch

    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def _of_tensor(images: torch.Tensor) -> Pictures:
    found: Pictures = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
    return found


_Change = Callable[[Pictures, Sequence[str]], Pictures]
_CHANGES: Mapping[str, _Change] = {
    CLEAN: _clean,
    "noise-1": partial(_noise, sigma=0.08),
    "noise-3": partial(_noise, sigma=0.18),
    "defocus_blur-1": partial(_defocus_blur, radius=3, aperture=0.4),
    "defocus_blur-3": partial(_defocus_blur, radius=6, aperture=0.6),
    # ImageNet-C has brightness, which is the other way; cameras fail in the dark.
    "darkness-1": partial(_darkness, stops=1),
    "darkness-3": partial(_darkness, stops=3),
    "low_contrast-1": partial(_low_contrast, left=0.4),
    "low_contrast-3": partial(_low_contrast, left=0.2),
    "jpeg-1": partial(_jpeg, quality=25),
    "jpeg-3": partial(_jpeg, quality=15),
    "flip": _flip,
    "shift": _shift,
    "reencoding": partial(_jpeg, quality=90),
}
assert tuple(_CHANGES) == VARIANTS
