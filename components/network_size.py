"""What a network costs, counted: parameters, zeros, multiplications, and the bytes of its weights."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from components.contracts.models import NetworkSize
from components.weights import packed


def network_size(network: nn.Module, example: torch.Tensor) -> NetworkSize:
    """Of a network that takes `example`, a batch of one."""
    parameters = list(network.parameters())
    return NetworkSize(
        parameters=sum(parameter.numel() for parameter in parameters),
        zeros=sum(int((parameter == 0).sum()) for parameter in parameters),
        macs=sum(layer.weight.numel() * count for layer, count in positions(network, example).items()),
        stored_bytes=len(save(packed(network.state_dict()))),
    )


def positions(network: nn.Module, example: torch.Tensor) -> dict[nn.Conv2d | nn.Linear, int]:
    """How often a weight of a convolution or a linear layer is multiplied for one image: once at every output place.

    A layer that is asked several times counts each time.
    """
    found: dict[nn.Conv2d | nn.Linear, int] = {}

    def count(layer: Any, _: Any, output: torch.Tensor) -> None:
        found[layer] = found.get(layer, 0) + output.numel() // (len(layer.weight) * len(example))

    hooks = [layer.register_forward_hook(count) for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    training = network.training
    try:
        with torch.no_grad():
            network.eval()(example)
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return found
