"""A GPU that is not there: torch's fake tensors know shapes and devices, and refuse what mixes devices as CUDA does.

What is read from such a tensor is not known, so a program gets as far as its first look at a value; gradients are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

GPU = "cuda"


class _MakingFakes(TorchFunctionMode):
    """What a program makes on the GPU, moves there or makes of what is there is a fake tensor."""

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()
        self.fakes = fakes

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        # Both need a driver.
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.backward:
            return None
        if any(_is_there(value) for value in (*args, *named.values())):
            with self.fakes:
                return func(*args, **named)
        return func(*args, **named)


def _is_there(value: object) -> bool:
    return isinstance(value, FakeTensor) or (isinstance(value, str | torch.device) and str(value).startswith(GPU))


@contextmanager
def fake_gpu() -> Iterator[None]:
    """`cuda` is a device within, of which nothing is computed."""
    with _MakingFakes(FakeTensorMode(allow_non_fake_inputs=True)):
        yield
