"""ONNX Runtime on the CPU: one self-contained ONNX file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from components.contracts.errors import EngineUnavailable, ExportError
from components.contracts.families import Built, ExportRequest
from components.contracts.models import Engine
from components.contracts.records import Stored

_ENTRY = "model.onnx"


class Target(BaseModel):
    """fp32 through the CPU execution provider."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    precisions: tuple[Literal["fp32"], ...] = ("fp32",)

    def built_by(self) -> str:
        return ""

    def absent(self) -> str:
        return ""

    def export(self, request: ExportRequest, *, out: Path) -> Built:
        import onnx
        import onnxruntime

        shutil.copy(request.onnx, out / _ENTRY)
        try:
            onnx.checker.check_model(str(out / _ENTRY))
            _session(out / _ENTRY, 1)
        except Exception as error:
            # The runtime has no common exception type; the subprocess this runs in reports the message.
            raise ExportError(f"ONNX Runtime cannot load the exported graph: {error}") from error
        return Built(entry=_ENTRY, runtime=f"onnxruntime {onnxruntime.__version__}")

    def load(self, engine: Stored[Engine], *, num_threads: int, num_streams: int = 1) -> _Predictor:
        try:
            # A session may be called from many threads; each call then has its share of the runtime's threads.
            return _Predictor(_session(engine.folder / engine.record.entry, max(1, num_threads // num_streams)))
        except ImportError as error:
            raise EngineUnavailable(f"onnxruntime is not installed: {error}") from error


def _session(path: Path, num_threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    # Spinning threads starve every other process of a small shared machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class _Predictor:
    def __init__(self, session: Any) -> None:
        self._session = session

    def predict(self, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        logits, embedding = self._session.run(["logits", "embedding"], {"images": images})
        return logits, embedding
