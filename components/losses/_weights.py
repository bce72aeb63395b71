"""Weights of classes by how many training images they have."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def class_weights(counts: torch.Tensor, exponent: float) -> torch.Tensor:
    """(images of the class) ** -exponent, one a class, float32, with mean 1 over the training images.

    A class without images weighs 1.
    """
    import torch

    number = counts.to(torch.float64)
    inverse = torch.where(number > 0, number.clamp(min=1) ** -exponent, 0.0)
    scale = number.sum() / (number * inverse).sum().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(number > 0, inverse * scale, 1.0).to(torch.float32)
