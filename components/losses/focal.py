"""Focal loss (Lin et al. 2017): what is answered well already counts less."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch


class Loss(BaseModel):
    """The mean of -alpha (1 - p)^gamma log p, p being the probability of the right class and alpha the weight of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gamma: float = Field(default=2.0, ge=0, le=10)
    """0 is cross-entropy."""
    exponent: float = Field(default=0.0, ge=0, le=1)
    """Alpha goes with (images of the class) ** -exponent; 0 for an alpha of 1, 1 makes every class count alike."""

    @property
    def takes_shares(self) -> bool:
        return False

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, *, counts: torch.Tensor) -> torch.Tensor:
        """Mean focal loss of logits (n, classes) with class numbers (n,)."""
        import torch
        from torch.nn import functional

        from components.losses._weights import class_weights

        log_right = functional.log_softmax(logits, dim=1).gather(1, targets[:, None])[:, 0]
        # 1 - p without the rounding that makes it 0 for a p near 1; the bound keeps the gradient finite for gamma below 1.
        wrong = (-torch.expm1(log_right)).clamp(min=torch.finfo(log_right.dtype).tiny)
        alpha = class_weights(counts, self.exponent).to(logits)[targets]
        return -(alpha * wrong**self.gamma * log_right).mean()
