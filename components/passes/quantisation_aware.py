"""Quantisation-aware fine-tuning (Jacob et al. 2018): where int8 would lose too many answers, the network learns it.

First the network is rounded as OpenVINO and ONNX Runtime will do it, its ranges found on train images, and asked about
valid. Where it loses no more than `limit`, it stays as it is. Else it is fine-tuned while it is rounded, and plain float
weights are left, which lie on the grids that targets find again by their own means. Ranges of activations are each target's
own, too, and TensorRT's are symmetric: it loses more by them than is told here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.errors import ConfigError, UnknownName
from components.contracts.families import PassRequest
from components.contracts.models import Precision
from components.contracts.verdicts import Estimate

if TYPE_CHECKING:
    import torch
    from torch import nn

_FEWEST = 10
_BEFORE = "_before_int8"
"""Where the network's own weights are, and the difference that int8 made to them, while it is fine-tuned."""


class Pass(BaseModel):
    """Lets the network learn to answer in int8, where it would lose more than `limit` by it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    limit: float = Field(default=0.01, ge=0, le=1)
    """By how much the share of right answers to valid may be below the float network's; the same as a target's max_drop."""
    num_images: int = Field(default=300, ge=_FEWEST, le=100_000)
    """Of train images that the ranges of activations are found on, at most."""
    keep: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Layers that are not rounded while the network learns, such as `head`, with the sums that they give to; targets decide
    about them for themselves."""

    @property
    def steps(self) -> int:
        return 1

    @property
    def undone_by_training(self) -> str:
        return "what it learned of int8"

    @property
    def only_for(self) -> Precision:
        return "int8"

    @property
    def keeps_batch_norm(self) -> bool:
        """Statistics of rounded activations are none of the float network, on which targets find their ranges."""
        return True

    def begin(self, network: nn.Module, request: PassRequest) -> None:
        """Round the network; where that costs little, take it back and be done."""
        state = {name: value.clone() for name, value in network.state_dict().items()}
        self._round(network, request)
        drop = self._asked(network, request, "int8 before")
        enough = drop.value >= -self.limit - 1e-9
        request.note(
            f"as it was, {_told(drop)}, {'within' if enough else 'outside'} the limit of {self.limit:g}"
            + ": nothing had to be trained" * enough
        )
        if enough and not request.rehearsal:
            _plain(network, keep_grids=False)
            request.enough()
        else:
            setattr(network, _BEFORE, (state, drop.value))

    def end(self, network: nn.Module, request: PassRequest) -> None:
        """Leave plain weights on their grids, and ask them as a target would: on ranges that are found anew."""
        _plain(network, keep_grids=True)
        self._round(network, request)
        drop = self._asked(network, request, "int8 after")
        _plain(network, keep_grids=False)
        state, before = getattr(network, _BEFORE)
        delattr(network, _BEFORE)
        better = drop.value > before
        request.note(
            f"fine-tuned, {_told(drop)}, against the network before in float"
            + "; that is no better, and the network is left as it was" * (not better)
        )
        if not better:
            network.load_state_dict(state)

    def _round(self, network: nn.Module, request: PassRequest) -> None:
        from components.fake_quantisation import calibrate, insert, layers

        found = layers(network)
        names = [name for name, _ in network.named_modules()]
        for kept in self.keep:
            if kept not in names:
                raise UnknownName("layer in keep", kept, list(found))
        below = tuple(f"{kept}." for kept in self.keep)
        chosen = {name: layer for name, layer in found.items() if not f"{name}.".startswith(below)}
        kept_whole = [module for name, module in network.named_modules() if f"{name}.".startswith(below)]
        if not chosen:
            raise ConfigError(f"keep: nothing is left to round without {', '.join(self.keep)}; leave one of them out")
        insert(network, request.example, chosen, kept=kept_whole)
        if idle := calibrate(network, self._calibration(request)):
            raise ConfigError(
                f"keep: layers whose weights are used without asking them cannot be rounded while the network learns; name "
                f"them, or what holds them, in keep: {', '.join(idle)}"
            )

    def _calibration(self, request: PassRequest) -> Iterator[torch.Tensor]:
        left = self.num_images
        for images in request.calibration():
            yield images[:left]
            left -= len(images)
            if left <= 0:
                return

    def _asked(self, network: nn.Module, request: PassRequest, what: str) -> Estimate:
        """The difference in right answers to valid, from the float network before the pass to this one."""
        import numpy as np
        import torch

        with torch.no_grad():
            right = [request.task.right(network(images)[0].numpy(), targets.numpy()) for images, targets in request.valid()]
        return request.compare(what, np.concatenate(right))


def _told(difference: Estimate) -> str:
    return (
        f"rounded to int8, right answers to valid images change by {difference.value:+.4f} [{difference.low:+.4f}, "
        f"{difference.high:+.4f}] (n={difference.n})"
    )


def _plain(network: nn.Module, *, keep_grids: bool) -> None:
    from components.fake_quantisation import remove

    remove(network, keep_grids=keep_grids)
