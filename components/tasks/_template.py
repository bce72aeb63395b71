"""A task: single-label classification whose loss looks more at the images that are still answered wrongly.

Change what is learnt, answered or measured by giving the class more of the protocol's methods (`Task` in
`components/contracts/families.py`); what it does not say is classification's. `visionloop plugin check` tries it; a recipe
names it as `training.task`.
Source: Lin et al., "Focal Loss for Dense Object Detection" (2017).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ConfigDict, Field

from components.tasks.classification import Task as Classification

if TYPE_CHECKING:
    import torch


class Task(Classification):
    """Classification with the focal loss."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    focus: float = Field(default=2.0, ge=0, le=5)
    """How much less an image counts that is answered rightly and surely; 0 is plain cross-entropy."""

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean over the batch."""
        from torch.nn import functional

        each = functional.cross_entropy(logits, targets, label_smoothing=self.label_smoothing, reduction="none")
        return ((1 - (-each).exp()) ** self.focus * each).mean()
