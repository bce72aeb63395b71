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
        macs=sum(multiplications(network, example).values()),
        stored_bytes=len(save(packed(network.state_dict()))),
    )


def multiplications(network: nn.Module, example: torch.Tensor) -> dict[tuple[nn.Module, str], int]:
    """Those of each weight of a convolution, a linear layer or attention's projections for one image, by layer and name.

    A weight is multiplied once at every output place, and a layer that is asked several times counts each time. Products
    without weights, such as those of attention's queries and keys, are left out.
    """
    found: dict[tuple[nn.Module, str], int] = {}

    def add(layer: nn.Module, name: str, weight: torch.Tensor, places: int) -> None:
        found[layer, name] = found.get((layer, name), 0) + weight.numel() * places // len(example)

    def of_layer(layer: Any, _: Any, output: torch.Tensor) -> None:
        add(layer, "weight", layer.weight, output.numel() // len(layer.weight))

    def of_attention(layer: nn.MultiheadAttention, given: tuple[Any, ...], named: dict[str, Any], _: Any) -> None:
        # It multiplies by its weights itself, and asks no layer of its own.
        inputs = dict(zip(("query", "key", "value"), given, strict=False)) | named
        tokens = [inputs[name].numel() // inputs[name].shape[-1] for name in ("query", "key", "value")]
        if layer.kdim == layer.vdim == layer.embed_dim:
            add(layer, "in_proj_weight", layer.in_proj_weight[: layer.embed_dim], sum(tokens))
        else:
            for name, places in zip("qkv", tokens, strict=True):
                add(layer, f"{name}_proj_weight", getattr(layer, f"{name}_proj_weight"), places)
        add(layer.out_proj, "weight", layer.out_proj.weight, tokens[0])

    hooks = [
        layer.register_forward_hook(of_attention, with_kwargs=True)
        if isinstance(layer, nn.MultiheadAttention)
        else layer.register_forward_hook(of_layer)
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.MultiheadAttention)
    ]
    training = network.training
    try:
        with torch.no_grad():
            network.eval()(example)
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return found
