"""Cross-entropy, with the label smoothed over all classes where it is asked for (Szegedy et al. 2016)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch


class Loss(BaseModel):
    """The mean over the batch of -log of the probability of the right class."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    smoothing: float = Field(default=0.0, ge=0, lt=1)
    """The share of the target that is spread evenly over all classes."""

    @property
    def takes_shares(self) -> bool:
        return True

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, *, counts: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of logits (n, classes) with class numbers (n,) or shares (n, classes)."""
        from torch.nn import functional

        return functional.cross_entropy(logits, targets, label_smoothing=self.smoothing)
