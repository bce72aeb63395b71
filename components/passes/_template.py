"""A pass: the smallest weights become zero, once.

Change the network by your own in `begin`; it is fine-tuned then, and `end` leaves plain layers. `visionloop plugin check`
tries it; `optimisation.passes` of a recipe names it as `pass`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import PassRequest

if TYPE_CHECKING:
    from torch import nn


class Pass(BaseModel):
    """Sets a share of each convolution's weights to zero, and lets them stay zero."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(default=0.1, gt=0, lt=1)
    """Of the weights of a layer."""

    @property
    def steps(self) -> int:
        return 1

    @property
    def undone_by_training(self) -> str:
        return "the zeros that it makes"

    def begin(self, network: nn.Module, request: PassRequest) -> None:
        """Mask the smallest weights: while the network is fine-tuned, they are multiplied by zero."""
        from torch import nn
        from torch.nn.utils import prune

        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                prune.l1_unstructured(layer, "weight", amount=self.share)  # type: ignore[no-untyped-call]

    def end(self, network: nn.Module, request: PassRequest) -> None:
        """Make the zeros permanent."""
        from torch import nn
        from torch.nn.utils import prune

        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
