"""Unstructured pruning: the smallest weights of all convolutions and linear layers together become zero, and stay zero.

The network keeps its layers, and the runtimes here multiply by zeros as by other numbers: what falls is what a checkpoint
takes on a disk, in which tensors of many zeros are stored without them, and what a compressed engine takes. Milliseconds
fall where whole channels go, which is the pass `prune`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.errors import ConfigError, UnknownName
from components.contracts.families import PassRequest
from components.contracts.wording import counted

if TYPE_CHECKING:
    from torch import nn


class Pass(BaseModel):
    """Sets `share` of the weights to zero, by their size alone (Han et al. 2015)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(default=0.5, gt=0, lt=1)
    """Of the weights of all its layers together; biases and normalisation stay."""
    steps: int = Field(default=3, ge=1, le=100)
    """The share is taken in so many equal parts, with a fine-tuning after each."""
    keep: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Layers that lose nothing, such as `head`."""

    @property
    def undone_by_training(self) -> str:
        return "the zeros that it makes"

    def begin(self, network: nn.Module, request: PassRequest) -> None:
        """Mask the smallest weights: while the network is fine-tuned, they are multiplied by zero.

        Those of the steps before are zero, and the smallest again.
        """
        from torch.nn.utils import prune

        layers = self._layers(network)
        chosen = [(layer, "weight") for layer in layers.values()]
        total = sum(layer.weight.numel() for layer in layers.values())
        most = total - len(layers)
        if round(self.share * total) > most:
            raise ConfigError(
                f"share: {self.share:g} of {total:,} weights leaves nothing of a layer: {most:,} of them are the most that "
                f"may go, so that {counted(len(layers), 'layer')} can keep one each; lower it"
            )
        amount = self.share * request.step / self.steps
        prune.global_unstructured(chosen, pruning_method=prune.L1Unstructured, amount=amount)
        empty = [name for name, layer in layers.items() if not layer.get_buffer("weight_mask").any()]
        # Random weights are as large as their layer's width says, and tell nothing of trained ones.
        if empty and not request.rehearsal:
            raise ConfigError(
                f"share: without the smallest {amount:g} of all weights nothing is left of {', '.join(empty)}; lower it, "
                f"or name {'it' if len(empty) == 1 else 'them'} in keep"
            )

    def end(self, network: nn.Module, request: PassRequest) -> None:
        """Make the zeros permanent."""
        from torch.nn.utils import prune

        for layer in self._layers(network).values():
            prune.remove(layer, "weight")  # type: ignore[no-untyped-call]

    def _layers(self, network: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
        """What loses weights, by name; raises UnknownName, ConfigError."""
        from torch import nn

        names = dict(network.named_modules())
        weighted: dict[str, nn.Conv2d | nn.Linear] = {
            name: layer for name, layer in names.items() if isinstance(layer, nn.Conv2d | nn.Linear)
        }
        for name in self.keep:
            if name not in names:
                raise UnknownName("layer in keep", name, list(weighted))
        kept = [f"{name}." for name in self.keep]
        found = {name: layer for name, layer in weighted.items() if not f"{name}.".startswith(tuple(kept))}
        if not found:
            raise ConfigError(f"keep: nothing could lose weights without {', '.join(self.keep)}; leave one of them out")
        return found
