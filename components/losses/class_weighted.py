"""Cross-entropy that counts an image of a rare class more (inverse frequency; 0.5 is the usual square root).

The mean is over the number of images, with weights whose mean over the training images is 1. torch divides by the weights of
a batch instead: there a batch of one class counts the same whichever it is, and parts of a batch do not add up to the whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch


class Loss(BaseModel):
    """Weights go with (images of the class) ** -exponent; a class without images weighs 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    exponent: float = Field(default=1.0, ge=0, le=1)
    """0 is cross-entropy, 1 makes every class count alike."""
    smoothing: float = Field(default=0.0, ge=0, lt=1)

    @property
    def takes_shares(self) -> bool:
        return True

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, *, counts: torch.Tensor) -> torch.Tensor:
        """Weighted mean cross-entropy of logits (n, classes) with class numbers (n,) or shares (n, classes)."""
        from torch.nn import functional

        from components.losses._weights import class_weights

        shares = targets if targets.ndim == 2 else functional.one_hot(targets, logits.shape[1])
        # Of shares torch takes the mean over the number of images.
        return functional.cross_entropy(
            logits,
            shares.to(logits.dtype),
            weight=class_weights(counts, self.exponent).to(logits.device, logits.dtype),
            label_smoothing=self.smoothing,
        )
