"""NVIDIA TensorRT: TensorRT-RTX builds ahead of time without a GPU; executing needs one.

Where a GPU and the `tensorrt` extra exist, full TensorRT builds for that GPU instead. Networks are strongly typed: the
precision is the graph's. An engine is bound to the GPU generations it was built for and to the library's version.
TensorRT-RTX is for GeForce and workstation cards: an H100 or H200 (compute capability 9.0) refuses its engines and needs
full TensorRT.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import threading
from collections import deque
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from components.contracts.errors import EngineUnavailable, ExportError
from components.contracts.families import Built, ExportRequest
from components.contracts.models import Engine
from components.contracts.records import Stored
from components.machine import gpu_driver
from components.targets._qdq import QdqQuantiser, float16
from components.targets._quantisation import Quantised, calibration_images, control

_ENTRY = "model.engine"
_INSTALL = (
    "run: python -m pip install tensorrt-rtx-cu13 (Linux on x86-64 alone), or, beside a GPU, python -m pip install tensorrt"
)


class Target(Quantised):
    """Dynamic batch from 1 to `max_batch`. Int8 layers are chosen by ONNX Runtime's answers of the same graph."""

    precisions: tuple[Literal["fp32", "fp16", "int8"], ...] = ("fp32", "fp16", "int8")
    compute_capabilities: tuple[str, ...] = ("SM86", "SM89", "SM120")
    """GPU generations to build for ahead of time: Ampere, Ada and Blackwell GeForce or workstation cards."""
    max_batch: int = Field(default=32, ge=1, le=1024)

    def built_by(self) -> str:
        return f"{_chosen()} {gpu_driver()}".strip()

    def absent(self) -> str:
        if _chosen():
            return ""
        return f"not built here: no TensorRT library is installed; {_INSTALL}"

    def export(self, request: ExportRequest, *, out: Path) -> Built:
        full = _chosen() == "tensorrt"
        trt = _library(_chosen(), ExportError)
        graph, facts = self._graph(request, out)
        logger = _logger(trt)
        logger.forget()
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(graph):
            problems = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
            raise ExportError(f"TensorRT cannot parse the graph: {problems}")
        config = builder.create_builder_config()
        built_for = self._aim(trt, config, full=full)
        size = request.checkpoint.record.preprocessing
        shape = (size.height, size.width, size.channels)
        profile = builder.create_optimization_profile()
        profile.set_shape("images", (1, *shape), (min(8, self.max_batch), *shape), (self.max_batch, *shape))
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise ExportError(f"TensorRT built no engine: {logger.errors()}")
        (out / _ENTRY).write_bytes(bytes(plan))
        return Built(entry=_ENTRY, runtime=f"{trt.__name__} {trt.__version__}", built_for=built_for, facts=facts)

    def _graph(self, request: ExportRequest, out: Path) -> tuple[bytes, dict[str, int | float | str]]:
        """ONNX in the precision that is wanted, as bytes, and what came of it."""
        if request.precision == "fp32":
            return request.onnx.read_bytes(), {}
        if request.precision == "fp16":
            return float16(request.onnx).SerializeToString(), {}
        images = calibration_images(request, self)
        quantiser = QdqQuantiser(request.onnx, images, for_tensorrt=True, scratch=out)
        controlled = control(quantiser, request, self, runtime="TensorRT's graph")
        facts = {"calibration_images": len(images), **controlled.facts}
        # What TensorRT fuses is its own affair and seen on a GPU alone: this is the share of the graph that it was given.
        facts["int8_share_of_graph"] = facts.pop("int8_share")
        return controlled.model.SerializeToString(), facts

    def _aim(self, trt: Any, config: Any, *, full: bool) -> tuple[str, ...]:
        if full:
            import torch

            major, minor = torch.cuda.get_device_capability()
            return (f"SM{major}{minor}",)
        valid = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
        for name in self.compute_capabilities:
            if name not in valid:
                raise ExportError(f"unknown compute capability {name!r}; valid: {', '.join(valid)}")
        config.num_compute_capabilities = len(self.compute_capabilities)
        for index, name in enumerate(self.compute_capabilities):
            config.set_compute_capability(trt.ComputeCapability.__members__[name], index)
        return self.compute_capabilities

    def load(self, engine: Stored[Engine], *, num_threads: int, num_streams: int = 1) -> _Predictor:
        if not _has_gpu():
            raise EngineUnavailable("built, not executed here: TensorRT needs an NVIDIA GPU and its driver")
        trt = _library(engine.record.runtime.split()[0], EngineUnavailable)
        logger = _logger(trt)
        logger.forget()
        runtime = trt.Runtime(logger)
        plan = runtime.deserialize_cuda_engine((engine.folder / engine.record.entry).read_bytes())
        if plan is None:
            raise EngineUnavailable(
                f"built, not executed here: {trt.__name__} {trt.__version__} does not accept an engine built by "
                f"{engine.record.runtime} for {', '.join(engine.record.built_for)} on this GPU: {logger.errors()}"
            )
        context = plan.create_execution_context()
        if context is None:
            raise EngineUnavailable(f"built, not executed here: TensorRT has no context for it: {logger.errors()}")
        return _Predictor(plan, context, logger, max_batch=self.max_batch)


def _chosen() -> str:
    """Full TensorRT where it is installed beside a GPU, TensorRT-RTX where that is installed, else nothing."""
    if gpu_driver() and importlib.util.find_spec("tensorrt") is not None:
        return "tensorrt"
    return "tensorrt_rtx" if importlib.util.find_spec("tensorrt_rtx") is not None else ""


def _library(name: str, error: type[ExportError] | type[EngineUnavailable]) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as cause:
        raise error(f"{name or 'TensorRT'} is not installed ({cause}); {_INSTALL}") from cause


@functools.cache
def _logger(trt: Any) -> Any:
    """The library's logger of this process: TensorRT keeps the first one it is given and gives reasons to nothing else."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._errors: deque[str] = deque(maxlen=3)

        def log(self, severity: Any, message: str) -> None:
            if severity in (self.INTERNAL_ERROR, self.ERROR):
                logging.getLogger(__name__).error("TensorRT: %s", message)
                self._errors.append(message)

        def forget(self) -> None:
            """What was heard before is no reason for what comes."""
            self._errors.clear()

        def errors(self) -> str:
            return "; ".join(self._errors) or "it gave no reason"

    return Logger()


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


class _Predictor:
    """Runs on the current CUDA device; device memory is held in torch tensors."""

    def __init__(self, engine: Any, context: Any, logger: Any, *, max_batch: int) -> None:
        self._engine = engine  # must live as long as its context
        self._context, self._logger = context, logger
        self._max_batch = max_batch
        # An execution context belongs to one caller at a time.
        self._lock = threading.Lock()

    def predict(self, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        with self._lock:
            self._logger.forget()
            pieces = [
                self._predict(np.ascontiguousarray(images[i : i + self._max_batch]))
                for i in range(0, len(images), self._max_batch)
            ]
        return np.concatenate([p[0] for p in pieces]), np.concatenate([p[1] for p in pieces])

    def _predict(self, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        import torch

        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            given = torch.from_numpy(images).cuda()
            if not self._context.set_input_shape("images", tuple(images.shape)):
                raise RuntimeError(f"TensorRT refused a batch of shape {images.shape}: {self._logger.errors()}")
            self._context.set_tensor_address("images", given.data_ptr())
            outputs = {}
            for name in ("logits", "embedding"):
                outputs[name] = torch.empty(tuple(self._context.get_tensor_shape(name)), device="cuda")
                self._context.set_tensor_address(name, outputs[name].data_ptr())
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise RuntimeError(f"TensorRT refused to execute: {self._logger.errors()}")
        stream.synchronize()
        return outputs["logits"].cpu().numpy(), outputs["embedding"].cpu().numpy()
