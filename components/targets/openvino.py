"""OpenVINO on the CPU: fp32, or int8 by NNCF's post-training quantisation on the calibration split."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from components.contracts.errors import EngineUnavailable, ExportError
from components.contracts.families import Built, ExportRequest
from components.contracts.models import Engine
from components.contracts.records import Stored
from components.contracts.wording import counted

_ENTRY = "model.xml"


class Target(BaseModel):
    """Input and output stay uint8 and fp32 in both precisions."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    precisions: tuple[Literal["fp32", "int8"], ...] = ("fp32", "int8")
    max_calibration_images: int = Field(default=300, ge=10)

    def built_by(self) -> str:
        return ""

    def absent(self) -> str:
        return ""

    def export(self, request: ExportRequest, *, out: Path) -> Built:
        import openvino

        # read_model, not convert_model: the converter's front end loads a telemetry client.
        model = openvino.Core().read_model(request.onnx)
        facts: dict[str, int | float | str] = {}
        if request.precision == "int8":
            model, count = self._quantised(model, request)
            facts |= {"int8_ops": sum(op.get_type_name() == "FakeQuantize" for op in model.get_ops())}
            facts |= {"int8_constants": _int8_constants(model), "calibration_images": count}
            if not facts["int8_constants"]:
                raise ExportError("quantisation left every weight in floating point; this engine would be int8 by name only")
        openvino.save_model(model, out / _ENTRY, compress_to_fp16=False)
        return Built(entry=_ENTRY, runtime=f"openvino {openvino.__version__}", facts=facts)

    def _quantised(self, model: Any, request: ExportRequest) -> tuple[Any, int]:
        import nncf

        images = [image[None] for batch in request.calibration() for image in batch][: self.max_calibration_images]
        if len(images) < 10:
            raise ExportError(
                f"{counted(len(images), 'calibration image')}; int8 needs at least 10: raise splitting.calibration_share"
            )
        quantised = nncf.quantize(
            model,
            nncf.Dataset(images),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(images),
            fast_bias_correction=True,
        )
        return quantised, len(images)

    def load(self, engine: Stored[Engine], *, num_threads: int, num_streams: int = 1) -> _Predictor:
        path = engine.folder / engine.record.entry
        return _Predictor(compiled(path, hint="LATENCY", num_threads=num_threads, num_streams=num_streams))


def compiled(path: Path, *, hint: Literal["LATENCY", "THROUGHPUT"], num_threads: int, num_streams: int | None = None) -> Any:
    """The model ready to run on the CPU; raises EngineUnavailable without OpenVINO."""
    try:
        import openvino
    except ImportError as error:
        raise EngineUnavailable(f"openvino is not installed: {error}") from error
    settings: dict[str, str | int] = {
        "PERFORMANCE_HINT": hint,
        # On processors with AMX the default is bf16, which is neither fp32 nor the reference's answer.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": num_threads,
    }
    if num_streams is not None and num_streams > 1:
        settings["NUM_STREAMS"] = num_streams
    return openvino.Core().compile_model(path, "CPU", settings)


def stream(model: Any, batches: Iterator[npt.NDArray[np.uint8]], output: str) -> Iterator[npt.NDArray[np.float32]]:
    """Outputs named `output` of all batches in order, several requests in flight.

    The requests have no callbacks in Python: a thread of OpenVINO that gives one up waits for Python's lock, and whoever
    drops the model meanwhile waits for that thread while holding the lock, for ever.
    """
    free = deque(model.create_infer_request() for _ in range(model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")))
    running: deque[Any] = deque()

    def first() -> npt.NDArray[np.float32]:
        request = running.popleft()
        request.wait()
        free.append(request)
        found: npt.NDArray[np.float32] = request.get_tensor(output).data.copy()
        return found

    try:
        for batch in batches:
            if not free:
                yield first()
            request = free.popleft()
            request.start_async({"images": batch})
            running.append(request)
        while running:
            yield first()
    finally:
        for request in running:
            request.wait()


def _int8_constants(model: Any) -> int:
    """Weight tensors that are stored as 8-bit integers."""
    constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
    return sum(op.get_element_type().get_type_name() in ("i8", "u8") and len(op.shape) > 1 for op in constants)


class _Predictor:
    def __init__(self, model: Any) -> None:
        self._model = model
        self._own = threading.local()

    def predict(self, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        request = getattr(self._own, "request", None)
        if request is None:
            # A request holds its own tensors: one for each thread that calls.
            request = self._own.request = self._model.create_infer_request()
        found = request.infer({"images": images})
        return found["logits"].copy(), found["embedding"].copy()
