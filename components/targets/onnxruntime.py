"""ONNX Runtime on the CPU, or by CUDA where that is: one self-contained ONNX file, in fp32, fp16 or int8 as Q/DQ pairs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from components.contracts.errors import EngineUnavailable, ExportError
from components.contracts.families import Built, ExportRequest
from components.contracts.models import Engine, Precision
from components.contracts.records import Stored
from components.machine import gpu_driver
from components.targets._fingerprint import PROPERTY, expect
from components.targets._qdq import QdqQuantiser, float16
from components.targets._quantisation import Quantised, calibration_images, control

_ENTRY = "model.onnx"


class Target(Quantised):
    """Input and output stay uint8 and fp32. fp16 is half the file and no faster on a CPU; int8 is the CPU's alone."""

    precisions: tuple[Literal["fp32", "fp16", "int8"], ...] = ("fp32", "fp16", "int8")

    def built_by(self) -> str:
        return ""

    def absent(self) -> str:
        return ""

    def export(self, request: ExportRequest, *, out: Path) -> Built:
        import onnx
        import onnxruntime

        facts: dict[str, int | float | str] = {}
        if request.precision == "fp32":
            shutil.copy(request.onnx, out / _ENTRY)
        elif request.precision == "fp16":
            onnx.save(float16(request.onnx), out / _ENTRY)
        else:
            images = calibration_images(request, self)
            quantiser = QdqQuantiser(request.onnx, images, for_tensorrt=False, scratch=out)
            controlled = control(quantiser, request, self, runtime="ONNX Runtime")
            onnx.save(controlled.model, out / _ENTRY)
            facts |= {"calibration_images": len(images), **controlled.facts}
        try:
            onnx.checker.check_model(str(out / _ENTRY))
            session = _session(out / _ENTRY, 1, request.precision)
        except Exception as error:
            # The runtime has no common exception type; the subprocess this runs in reports the message.
            raise ExportError(f"ONNX Runtime cannot load the exported graph: {error}") from error
        facts["provider"] = session.get_providers()[0]
        return Built(entry=_ENTRY, runtime=f"onnxruntime {onnxruntime.__version__}", facts=facts)

    def load(self, engine: Stored[Engine], *, num_threads: int, num_streams: int = 1) -> _Predictor:
        path, threads = engine.folder / engine.record.entry, max(1, num_threads // num_streams)
        try:
            # A session may be called from many threads; each call then has its share of the runtime's threads.
            session = _session(path, threads, engine.record.precision)
        except ImportError as error:
            raise EngineUnavailable(
                f"onnxruntime is not installed ({error}); run: python -m pip install onnxruntime"
            ) from error
        expect(engine.record, session.get_modelmeta().custom_metadata_map.get(".".join(PROPERTY)))
        return _Predictor(session)


def _session(path: Path, num_threads: int, precision: Precision) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    # Spinning threads starve every other process of a small shared machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=_providers(precision))


def _providers(precision: Precision) -> list[Any]:
    """CUDA's has no integer convolutions, and without TF32, which is no fp32, its answers are the reference's."""
    import onnxruntime

    if precision == "int8" or "CUDAExecutionProvider" not in onnxruntime.get_available_providers() or not gpu_driver():
        return ["CPUExecutionProvider"]
    return [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]


class _Predictor:
    def __init__(self, session: Any) -> None:
        self._session = session

    def predict(self, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        logits, embedding = self._session.run(["logits", "embedding"], {"images": images})
        return logits, embedding
