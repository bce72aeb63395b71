"""Cross-entropy that counts an image of a rare class more (inverse frequency; 0.5 is the usual square root)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch


class Loss(BaseModel):
    """Weights are (n / (classes x images of the class)) ** exponent; of a class without images, 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    exponent: float = Field(default=1.0, ge=0, le=1)
    """0 is cross-entropy, 1 makes every class count alike."""
    smoothing: float = Field(default=0.0, ge=0, lt=1)

    @property
    def takes_shares(self) -> bool:
        return True

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, *, counts: torch.Tensor) -> torch.Tensor:
        """Weighted mean cross-entropy of logits (n, classes) with class numbers (n,) or shares (n, classes)."""
        import torch
        from torch.nn import functional

        weights = (counts.sum() / (len(counts) * counts.clamp(min=1))) ** self.exponent
        weights = torch.where(counts > 0, weights, torch.ones_like(weights)).to(logits.dtype)
        shares = targets if targets.ndim == 2 else functional.one_hot(targets, logits.shape[1]).to(logits.dtype)
        smooth = shares * (1 - self.smoothing) + self.smoothing / logits.shape[1]
        each = -(smooth * functional.log_softmax(logits, dim=1)).sum(dim=1)
        of_each = shares @ weights
        return (of_each * each).sum() / of_each.sum()
