"""OpenVINO on the CPU: fp32, or int8 by NNCF's post-training quantisation with accuracy control."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from components.contracts.errors import EngineUnavailable, ExportError
from components.contracts.families import Built, ExportRequest
from components.contracts.models import Engine
from components.contracts.records import Stored
from components.targets._fingerprint import PROPERTY, expect
from components.targets._quantisation import Executed, Quantised, calibration_images, control

_ENTRY = "model.xml"
_BATCH = 32


class Target(Quantised):
    """Input and output stay uint8 and fp32 in both precisions."""

    precisions: tuple[Literal["fp32", "int8"], ...] = ("fp32", "int8")

    def built_by(self) -> str:
        return ""

    def absent(self) -> str:
        return ""

    def export(self, request: ExportRequest, *, out: Path) -> Built:
        import openvino

        try:
            # read_model, not convert_model: the converter's front end loads a telemetry client.
            model = openvino.Core().read_model(request.onnx)
        except RuntimeError as error:
            raise ExportError(f"OpenVINO cannot read the graph: {_in_its_words(error)}") from error
        facts: dict[str, int | float | str] = {}
        if request.precision == "int8":
            images = calibration_images(request, self)
            _fold(model)
            controlled = control(_Quantiser(model, images), request, self, runtime="OpenVINO")
            model = controlled.model
            facts |= {"calibration_images": len(images), "int8_constants": _int8_constants(model), **controlled.facts}
        model.set_rt_info(request.checkpoint.record.preprocessing.digest(), list(PROPERTY))
        openvino.save_model(model, out / _ENTRY, compress_to_fp16=False)
        return Built(entry=_ENTRY, runtime=f"openvino {openvino.__version__}", facts=facts)

    def load(self, engine: Stored[Engine], *, num_threads: int, num_streams: int = 1) -> _Predictor:
        path = engine.folder / engine.record.entry
        return _Predictor(
            compiled(path, hint="LATENCY", num_threads=num_threads, num_streams=num_streams, engine=engine.record)
        )


def compiled(
    path: Path,
    *,
    hint: Literal["LATENCY", "THROUGHPUT"],
    num_threads: int,
    num_streams: int | None = None,
    engine: Engine | None = None,
) -> Any:
    """The model ready to run on the CPU; raises EngineUnavailable without OpenVINO, or for the file of another engine."""
    try:
        import openvino
    except ImportError as error:
        raise EngineUnavailable(f"openvino is not installed ({error}); run: python -m pip install openvino") from error
    settings: dict[str, str | int] = {
        "PERFORMANCE_HINT": hint,
        # On processors with AMX the default is bf16, which is neither fp32 nor the reference's answer.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": num_threads,
    }
    if num_streams is not None and num_streams > 1:
        settings["NUM_STREAMS"] = num_streams
    core = openvino.Core()
    model = core.read_model(path)
    if engine is not None:
        expect(engine, model.get_rt_info(list(PROPERTY)).astype(str) if model.has_rt_info(list(PROPERTY)) else None)
    return core.compile_model(model, "CPU", settings)


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


def _in_its_words(error: RuntimeError) -> str:
    """What OpenVINO says is wrong, without the places in its source that it begins with."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check '", "[", "FrontEnd"))]
    return " ".join(told or lines)[:500]


def _fold(model: Any) -> None:
    """Make one constant of the weights of each depthwise layer.

    The graph that is read has them as a constant and what gives it its shape. NNCF then quantises along the wrong axis, and
    OpenVINO executes such a layer in float: 16 of the 50 of EfficientNet-Lite0.
    """
    from openvino.passes import ConstantFolding, Manager

    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(model)


def _int8_constants(model: Any) -> int:
    """Weight tensors that are stored as 8-bit integers."""
    constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
    return sum(op.get_element_type().get_type_name() in ("i8", "u8") and len(op.shape) > 1 for op in constants)


_LAYERS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul")
_MOVING = ("MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operations that quantisation goes past: the ranges before and after them are the same."""


class _Quantiser:
    """Quantises by NNCF."""

    def __init__(self, model: Any, images: npt.NDArray[np.uint8]) -> None:
        self._model, self._images = model, images
        self._given = {
            op.get_friendly_name(): [op.input_value(index).get_node() for index in range(op.get_input_size())]
            for op in model.get_ops()
            if op.get_type_name() in _LAYERS
        }

    def in_float(self) -> Any:
        return self._model

    def quantised(self, kept: Sequence[str]) -> Any:
        import nncf

        nncf.set_log_level(logging.ERROR)
        return nncf.quantize(
            self._model,
            nncf.Dataset([image[None] for image in self._images]),
            # Against symmetric activations, half the answers that are otherwise: 2.3 and 3.7 % on CIFAR-10.
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(self._images),
            fast_bias_correction=True,
            ignored_scope=nncf.IgnoredScope(names=list(kept)),
        )

    def layers(self, model: Any) -> list[str]:
        found = ((op.get_friendly_name(), op) for op in model.get_ordered_ops() if op.get_type_name() in _LAYERS)
        return [name for name, op in found if name in self._given and self._restorable(name, op)]

    def without(self, model: Any, layer: str) -> Any:
        changed = model.clone()
        (op,) = (op for op in changed.get_ops() if op.get_friendly_name() == layer)
        for given, source in self._restorable(layer, op):
            given.replace_source_output(source)
        return changed

    def _restorable(self, name: str, op: Any) -> list[tuple[Any, Any]]:
        """Inputs of a layer or of what moves its numbers about, each with what it was given before quantisation."""
        found: list[tuple[Any, Any]] = []
        for given, original in zip(op.inputs(), self._given[name], strict=True):
            source = given.get_source_output().get_node()
            if original.get_type_name() == "Constant":
                if source.get_type_name() != "Constant":
                    found.append((given, original.output(0)))
                continue
            while source.get_type_name() in _MOVING:
                given, source = source.input(0), source.input_value(0).get_node()
            if source.get_type_name() == "FakeQuantize":
                found.append((given, source.input_value(0)))
        return found

    def logits(self, model: Any, images: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.float32]]:
        import openvino

        ready = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        request = ready.create_infer_request()
        for start in range(0, len(images), _BATCH):
            yield request.infer({"images": images[start : start + _BATCH]})["logits"].copy()

    def compute(self, model: Any) -> list[Executed]:
        return executed(model)


def executed(model: Any) -> list[Executed]:
    """The layers that multiply in the graph that OpenVINO makes of a model."""
    import openvino

    single = model.clone()
    single.reshape({single.input("images"): [1, *list(single.input("images").get_partial_shape())[1:]]})
    ready = openvino.Core().compile_model(single, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found: list[Executed] = []
    for op in ready.get_runtime_model().get_ordered_ops():
        told = {name: str(getattr(value, "value", value)) for name, value in op.get_rt_info().items()}
        if told.get("layerType") not in ("Convolution", "Deconvolution", "FullyConnected", "MatMul"):
            continue
        made = list(op.get_output_shape(0))
        given, other = list(op.get_input_shape(0)), list(op.get_input_shape(1))
        # A convolution multiplies each output by the weights of its channel, a product of matrices by a row of the first.
        each = math.prod(other) / made[1] if "onvolution" in told["layerType"] else given[-1]
        name = told.get("originalLayersNames", op.get_friendly_name()).split(",")[0]
        found.append(Executed(name, float(math.prod(made) * each), told["runtimePrecision"] in ("i8", "u8")))
    return found


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
