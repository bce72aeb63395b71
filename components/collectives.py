"""What the processes of one training say to each other: sums, means, answers put together, whose turn it is.

In a training of one process each of these is what the process has itself. Sums are the same bits in every process, so all of
them take the same decisions from then on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from components.compute import Compute

if TYPE_CHECKING:
    import torch
    from torch import nn

STEP = datetime.timedelta(minutes=30)
"""Nobody waits longer for a step of another process; one that ended is noticed at once."""
_TURN = datetime.timedelta(days=30)
"""Pictures that are decoded and computed once, while the others wait, may take long."""


def backend(compute: Compute) -> str:
    """What processes talk by: gradients on GPUs by NCCL, and what lies in memory by gloo in any case."""
    return "cpu:gloo,cuda:nccl" if compute.on_gpu else "gloo"


def joined(compute: Compute, device: str | None = None) -> Compute:
    """Meet the other processes, which torch finds by the environment that a launcher set.

    Each has a GPU of its own: the one that is named, or that of its number on its machine.
    """
    import torch
    import torch.distributed as dist

    if compute.on_gpu:
        compute = dataclasses.replace(compute, device=device or f"cuda:{dist.get_node_local_rank()}")
        torch.cuda.set_device(compute.device)
    if not dist.is_initialized():
        dist.init_process_group(backend(compute), timeout=STEP)
    return dataclasses.replace(compute, rank=dist.get_rank(), num_processes=dist.get_world_size())


def is_of_another(error: BaseException) -> bool:
    """Whether an error only tells that another process is gone."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or any(word in str(error) for word in ("gloo", "NCCL", "closed by peer"))


@functools.cache
def _patient() -> Any:
    """A group of all processes that waits long."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=_TURN)


def meet(compute: Compute) -> None:
    """Go on when every process is here."""
    import torch.distributed as dist

    if compute.num_processes > 1:
        dist.barrier(group=_patient())


@contextlib.contextmanager
def first_alone(compute: Compute) -> Iterator[None]:
    """The first process does what is within while the others wait; then they do it, and find what it cached."""
    if compute.rank > 0:
        meet(compute)
    yield
    if compute.rank == 0:
        meet(compute)


def total(value: float, compute: Compute) -> float:
    """The sum over all processes."""
    import torch
    import torch.distributed as dist

    if compute.num_processes == 1:
        return value
    found = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(found)
    return float(found)


def mean_of(tensors: Sequence[torch.Tensor], compute: Compute) -> None:
    """Let tensors of the same shapes be their mean over all processes, in place."""
    import torch
    import torch.distributed as dist

    if compute.num_processes == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= compute.num_processes
    for tensor, mean in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def gathered(own: torch.Tensor, compute: Compute) -> torch.Tensor:
    """The rows (n, ...) of all processes in memory, in their order; how many there are may differ by one."""
    import torch
    import torch.distributed as dist

    if compute.num_processes == 1:
        return own
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(compute.num_processes)]
    dist.all_gather(lengths, torch.tensor([len(own)]))
    longest = int(max(lengths))
    padded = own.new_zeros(longest, *own.shape[1:])
    padded[: len(own)] = own
    found = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(found, padded)
    return torch.cat([rows[: int(length)] for rows, length in zip(found, lengths, strict=True)])


def together(steps: nn.Module, compute: Compute) -> nn.Module:
    """What answers in a step, such that gradients are means over all processes; all begin with the weights of the first."""
    from torch.nn.parallel import DistributedDataParallel

    if compute.num_processes == 1:
        return steps
    # Statistics of batch normalisation are made one by the step itself: see `statistics`.
    return DistributedDataParallel(steps, broadcast_buffers=False, gradient_as_bucket_view=True)


def statistics(model: nn.Module) -> list[torch.Tensor]:
    """What batch normalisation counts while it trains: each process has seen its own part of a batch."""
    from torch.nn.modules.batchnorm import _BatchNorm

    kept = (module for module in model.modules() if isinstance(module, _BatchNorm) and module.training)
    return [buffer for module in kept for buffer in module.buffers() if buffer.is_floating_point()]


@contextlib.contextmanager
def unshared(steps: nn.Module, *, when: bool) -> Iterator[None]:
    """Gradients are added up in each process and not shared yet: another part of the batch comes."""
    no_sync = getattr(steps, "no_sync", None)
    with no_sync() if when and no_sync is not None else contextlib.nullcontext():
        yield
