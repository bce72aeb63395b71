"""A network that computes as an int8 engine would, in float: its weights and what its layers are given are rounded.

Weights lie on symmetric grids of 255 steps, one for each output channel, whose scale follows from the weights; activations
on one grid of 256 steps, from the mean of the images' least values to that of their greatest, as NNCF calibrates them, which
goes with them while they are trained. Both are torch's own operators, which let gradients through within the range. Batch
normalisation stays beside its layer: what exporters fold into a layer scales its output channels, and with each its grid.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

_Layer = nn.modules.conv._ConvNd | nn.Linear
_INPUT, _OUTPUT = "rounded_input", "rounded_output"
"""What the rounding of a layer's input or output is called among its modules."""
_SUMS = ("add", "add_", "__add__", "__iadd__", "__radd__")
_LEAST_STEP = 1e-12
_FOLLOWED = 0.1
"""Of the range of a batch, in every step: the ranges go with the activations."""


class RoundedWeight(nn.Module):
    """The weights of a layer on their grids, anew for every step."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        self.axis = int(transposed)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """(out, in, ...), or (in, out, ...) of a transposed convolution, to the same."""
        scale = weight.detach().abs().transpose(0, self.axis).flatten(1).amax(1).clamp_min(_LEAST_STEP) / 127
        zero = torch.zeros_like(scale, dtype=torch.int32)
        rounded: torch.Tensor = torch.fake_quantize_per_channel_affine(weight, scale, zero, self.axis, -127, 127)
        return rounded


class RoundedActivation(nn.Module):
    """Activations on a grid that holds zero; it is not there before it was calibrated."""

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.seen: list[torch.Tensor] | None = None
        """While it is calibrated: the least and the greatest values of the images (2, n) of each batch."""
        self.handle: RemovableHandle | None = None

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        flat = values.detach().float().flatten(1)
        least, greatest = flat.amin(1), flat.amax(1)
        if self.seen is not None:
            self.seen.append(torch.stack([least, greatest]))
            return values
        if self.training:
            # On a range that stands still a network learns to be cut off, which it is not where ranges are found anew.
            self.low.lerp_(least.mean().clamp_max(0), _FOLLOWED)
            self.high.lerp_(greatest.mean().clamp_min(0), _FOLLOWED)
        # The operator makes numbers of NaN and of what is infinite, and a training that diverges would not be seen.
        odd = least.sum() * 0 + greatest.sum() * 0
        scale = ((self.high - self.low) / 255).clamp_min(_LEAST_STEP)
        zero = (-self.low / scale).round().nan_to_num().to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(values.float(), scale + odd, zero, 0, 255).to(values.dtype)


def layers(network: nn.Module) -> dict[str, nn.Module]:
    """What is rounded: convolutions and linear layers, by name."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, _Layer)}


def insert(
    network: nn.Module, example: torch.Tensor, chosen: Mapping[str, nn.Module], *, kept: Collection[nn.Module] = ()
) -> None:
    """Round the weights and inputs of the chosen layers, and what modules that are not kept give to sums."""
    summed = [module for module in _summed(network, example) if module not in kept]
    for layer in chosen.values():
        parametrize.register_parametrization(layer, "weight", RoundedWeight(layer))
        rounding = RoundedActivation().train(layer.training)
        rounding.handle = layer.register_forward_pre_hook(_round_input)
        layer.add_module(_INPUT, rounding)
    for module in summed:
        rounding = RoundedActivation().train(module.training)
        rounding.handle = module.register_forward_hook(_round_output)
        module.add_module(_OUTPUT, rounding)


def calibrate(network: nn.Module, batches: Iterable[torch.Tensor]) -> list[str]:
    """Measure the ranges of activations on images (n, h, w, c); returns the layers that were never given anything."""
    found = dict(_roundings(network))
    for rounding in found.values():
        rounding.seen = []
    with torch.no_grad():
        for images in batches:
            network(images)
    idle = []
    for name, rounding in found.items():
        seen, rounding.seen = rounding.seen, None
        if not seen:
            idle.append(name.rpartition(".")[0])
            continue
        low, high = torch.cat(seen, dim=1).mean(dim=1)
        rounding.low.copy_(low.clamp_max(0))
        rounding.high.copy_(high.clamp_min(0))
    return idle


def remove(network: nn.Module, *, keep_grids: bool) -> None:
    """Leave plain layers again: their weights on their grids, or as they were given to be rounded."""
    for _, rounding in list(_roundings(network)):
        assert rounding.handle is not None
        rounding.handle.remove()
    for module in list(network.modules()):
        for name in (_INPUT, _OUTPUT):
            if isinstance(getattr(module, name, None), RoundedActivation):
                delattr(module, name)
        if parametrize.is_parametrized(module, "weight"):
            with torch.no_grad():
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=keep_grids)


def _roundings(network: nn.Module) -> Iterator[tuple[str, RoundedActivation]]:
    return ((name, module) for name, module in network.named_modules() if isinstance(module, RoundedActivation))


def _round_input(layer: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return (getattr(layer, _INPUT)(given[0]), *given[1:])


def _round_output(module: Any, _: Any, made: torch.Tensor) -> torch.Tensor:
    rounded: torch.Tensor = getattr(module, _OUTPUT)(made)
    return rounded


class _Sums(TorchFunctionMode):
    """Notes which modules made what is added to something."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[torch.Tensor, nn.Module]] = {}
        """By the identity of a tensor, which is kept alive so that no other one gets it."""
        self.found: dict[nn.Module, None] = {}
        self.calls: dict[nn.Module, int] = {}

    def note(self, module: nn.Module, _: Any, made: Any) -> None:
        self.calls[module] = self.calls.get(module, 0) + 1
        if isinstance(made, torch.Tensor):
            self.made[id(made)] = (made, module)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _SUMS:
            self.found |= {self.made[id(part)][1]: None for part in args[:2] if id(part) in self.made}
        return func(*args, **(kwargs or {}))


def _summed(network: nn.Module, example: torch.Tensor) -> list[nn.Module]:
    """Modules without others inside whose output is added to something.

    One that is asked at several places, such as a block's only ReLU, has no range of its own.
    """
    sums = _Sums()
    leaves = [module for module in network.modules() if not any(True for _ in module.children())]
    handles = [leaf.register_forward_hook(sums.note) for leaf in leaves]
    try:
        with torch.no_grad(), sums:
            network(example)
    finally:
        for handle in handles:
            handle.remove()
    return [module for module in sums.found if sums.calls[module] == 1]
