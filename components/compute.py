"""What a training computes on: a device, a precision, the parts of a batch, several processes.

The processor is the default because resumption is exact to the bit there, and recipes mean the same on every machine. None
of these settings changes the effective batch: what is learned differs by rounding, and by batch normalisation, which takes
its statistics from the parts of a batch one by one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from components.contracts.errors import ConfigError
from components.contracts.records import Record
from components.contracts.wording import counted
from components.machine import gpu_driver

if TYPE_CHECKING:
    import torch

PLACE = "training.compute"
"""Where a recipe keeps these settings."""
TrainingPrecision = Literal["fp32", "bf16", "fp16"]


class ComputeConfig(Record):
    """Where and how the steps of every phase are computed."""

    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """`auto` is the first GPU where one is, and the processor elsewhere. On a GPU nothing is exact to the bit."""
    precision: TrainingPrecision = "fp32"
    """Of the forward pass of a step; weights, losses, gradients and what valid is answered by stay fp32.

    `fp16` scales the loss so that small gradients survive, and is for GPUs.
    """
    accumulate: int = Field(default=1, ge=1, le=32_768)
    """In how many parts a batch is computed, one after the other, with one step for all of them: for less memory."""
    channels_last: bool = False
    """The weights of convolutions lie with their channels side by side, as the pictures do."""
    compile: bool = False
    """torch.compile, which takes a minute at the start of a phase and needs a compiler."""
    launcher: Literal["local", "torchrun", "ray"] = "local"
    """`local` is the process of the run; `torchrun` starts several on this machine, each on a share of every batch; `ray`
    does so on the machines of the Ray cluster at VISIONLOOP_RAY_ADDRESS, which share a file system.
    """
    processes: int = Field(default=1, ge=1, le=1024)
    """They share the threads of VISIONLOOP_NUM_THREADS; on GPUs each has one of its own."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.precision == "fp16" and self.device == "cpu":
            raise ValueError("precision: fp16 is for GPUs, and device is cpu; use bf16 or fp32, or set device to cuda")
        if self.launcher == "local" and self.processes > 1:
            raise ValueError(
                f"processes: {self.processes} need a launcher that starts them; set launcher to torchrun, or processes to 1"
            )
        if self.launcher == "torchrun" and self.processes == 1:
            raise ValueError("launcher: torchrun starts several processes; set processes to 2 or more, or launcher to local")
        if self.launcher == "ray" and self.device == "auto":
            raise ValueError("device: auto is a device of this machine, and launcher is ray; set device to cpu or cuda")
        return self


@dataclass(frozen=True)
class Compute:
    """The settings as they come out on this machine."""

    device: str = "cpu"
    """As torch spells it."""
    precision: TrainingPrecision = "fp32"
    accumulate: int = 1
    channels_last: bool = False
    compile: bool = False
    hardware: str = field(default="", compare=False)
    """The GPU's name; empty for the processor."""
    rank: int = 0
    """Which of the processes this is."""
    num_processes: int = 1

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def key(self) -> str:
        """Names what else than the settings changes a result; empty on the processor."""
        return f"cuda {self.hardware}" if self.on_gpu else ""

    @property
    def told(self) -> str:
        """In words, where it is not the processor in fp32."""
        how = [self.hardware or self.device if self.on_gpu else "the processor"]
        how += [f"in {self.precision}"] if self.precision != "fp32" else []
        how += [f"every batch in {self.accumulate} parts"] if self.accumulate > 1 else []
        how += ["channels last"] if self.channels_last else []
        how += ["compiled"] if self.compile else []
        how += [f"by {self.num_processes} processes"] if self.num_processes > 1 else []
        how += ["not exact to the bit"] if self.on_gpu else []
        return ", ".join(how) if self != Compute() else ""

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """What runs within is computed in the precision."""
        import torch

        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.split(":")[0], dtype=dtype, enabled=self.precision != "fp32")

    def scaler(self) -> torch.amp.GradScaler | None:
        """What scales the loss in fp16, of which small gradients would be zero; None elsewhere."""
        import torch

        return torch.amp.GradScaler(self.device.split(":")[0]) if self.precision == "fp16" else None


def resolve(config: ComputeConfig, num_threads: int | None = None) -> Compute:
    """The settings on this machine, with so many threads; raises ConfigError for what it cannot do."""
    device = _device(config)
    if config.precision == "fp16" and device == "cpu":
        raise ConfigError(
            f"{PLACE}.precision: fp16 is for GPUs, and device: auto finds none here ({_no_gpu()}); use bf16 or fp32"
        )
    if config.compile:
        _expect_compiler(device)
    hardware = ""
    if device != "cpu":
        import torch

        hardware = torch.cuda.get_device_name(device)
        if config.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ConfigError(f"{PLACE}.precision: the GPU here, {hardware}, does not compute in bf16; use fp16 or fp32")
    if config.launcher == "torchrun":
        _expect_room(config.processes, device, num_threads)
    return Compute(
        device,
        config.precision,
        config.accumulate,
        config.channels_last,
        config.compile,
        hardware,
        num_processes=config.processes,
    )


def on_a_cluster(config: ComputeConfig) -> Compute:
    """The settings on machines that are not known yet, which look after them by themselves."""
    return Compute(
        config.device,
        config.precision,
        config.accumulate,
        config.channels_last,
        config.compile,
        "GPUs of a Ray cluster" if config.device == "cuda" else "",
        num_processes=config.processes,
    )


def num_gpus() -> int:
    """How many GPUs this process sees."""
    import torch

    return torch.cuda.device_count()


def _expect_room(processes: int, device: str, num_threads: int | None) -> None:
    """Raise ConfigError where processes would have to share a GPU or a thread."""
    if device != "cpu":
        if processes > num_gpus():
            raise ConfigError(
                f"{PLACE}.processes: each of {processes} processes needs a GPU of its own, and there "
                f"{'is one' if num_gpus() == 1 else f'are {num_gpus()}'} here; lower it"
            )
    elif num_threads is not None and processes > num_threads:
        raise ConfigError(
            f"{PLACE}.processes: {processes} processes share {counted(num_threads, 'thread')}, and each needs one; lower "
            f"it, or raise VISIONLOOP_NUM_THREADS"
        )


def _device(config: ComputeConfig) -> str:
    if config.device == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return f"cuda:{torch.cuda.current_device()}"
    if config.device == "auto":
        return "cpu"
    raise ConfigError(
        f"{PLACE}.device is cuda, and torch finds no GPU here ({_no_gpu()}); train where one is, or use device: cpu, or "
        f"auto for a GPU where there is one"
    )


def _no_gpu() -> str:
    """Why torch finds no GPU."""
    import torch

    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return f"it was built for CUDA {torch.version.cuda}; driver: {gpu_driver() or 'none'}"


def _expect_compiler(device: str) -> None:
    """Raise ConfigError where torch.compile has nothing to compile with."""
    problem = _no_compiler(device)
    if problem:
        raise ConfigError(f"{PLACE}.compile: torch.compile {problem}; install it, or leave compile out")


def _no_compiler(device: str) -> str:
    if device != "cpu":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "needs Triton on a GPU, and it is not here or does not know this one"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "needs a C++ compiler (g++ or clang++) on a processor, and there is none here"
    return ""


@contextlib.contextmanager
def compiling(compute: Compute) -> Iterator[None]:
    """Within, what torch.compile cannot compile is told as a ConfigError."""
    if not compute.compile:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, CUDACompileError, InvalidCxxCompiler

    try:
        yield
    except (TorchDynamoException, CppCompileError, CUDACompileError, InvalidCxxCompiler) as error:
        said = " ".join(str(error).split("Set TORCHDYNAMO_VERBOSE")[0].split()) or type(error).__name__
        raise ConfigError(
            f"{PLACE}.compile: torch.compile cannot compile this network here ({said[:300]}); leave compile out"
        ) from error


def expect_parts(config: ComputeConfig, batch_size: int, num_train: int, place: str) -> None:
    """Raise ConfigError where a batch is too small for the parts and processes; a part is two examples at least."""
    largest, parts = min(batch_size, num_train), config.accumulate * config.processes
    if parts == 1 or largest >= 2 * parts:
        return
    key = "accumulate" if config.processes == 1 else "processes"
    among = "" if config.processes == 1 else f"by {config.processes} processes "
    of = "batch_size" if batch_size <= num_train else "the train split"
    raise ConfigError(
        f"{PLACE}.{key}: a batch of {counted(largest, 'image')} ({place}: {of}) cannot be computed {among}in "
        f"{parts} parts, of two images each at least; lower {key}, or raise batch_size"
    )


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; a GPU copies it while the processor goes on."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a network lies."""
    import torch

    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
