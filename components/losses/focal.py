"""Focal loss (Lin et al. 2017): what is answered well already counts less."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch


class Loss(BaseModel):
    """The mean of -(1 - p)^gamma log p, p being the probability of the right class."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gamma: float = Field(default=2.0, ge=0, le=10)
    """0 is cross-entropy."""

    @property
    def takes_shares(self) -> bool:
        return False

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, *, counts: torch.Tensor) -> torch.Tensor:
        """Mean focal loss of logits (n, classes) with class numbers (n,)."""
        from torch.nn import functional

        log_right = functional.log_softmax(logits, dim=1).gather(1, targets[:, None])[:, 0]
        return -((1 - log_right.exp()) ** self.gamma * log_right).mean()
