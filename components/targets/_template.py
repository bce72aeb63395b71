"""A target: ONNX Runtime on the CPU, with a choice of how far it rewrites the graph.

Build for your own runtime in `export` and open it in `load` instead. Both are given ONNX (uint8 images in, logits and
embedding out), and a library that is heavy or may be missing is imported inside the method that needs it. `visionloop plugin
check` tries it; a recipe names it under `export.targets`.
"""

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

    rewriting: Literal["none", "basic", "all"] = "all"
    """How far the runtime rewrites the graph when it opens it."""

    @property
    def precisions(self) -> tuple[Literal["fp32"], ...]:
        """What it can build."""
        return ("fp32",)

    def built_by(self) -> str:
        """Nothing of this machine: any machine builds the same."""
        return ""

    def absent(self) -> str:
        """Nothing is missing on any machine."""
        return ""

    def export(self, request: ExportRequest, *, out: Path) -> Built:
        """Write the engine's one file; raises ExportError when the runtime cannot open it."""
        import onnxruntime

        shutil.copy(request.onnx, out / _ENTRY)
        try:
            self._session(out / _ENTRY, num_threads=1)
        except Exception as error:
            # The runtime has no common exception type.
            raise ExportError(f"ONNX Runtime cannot load the exported graph: {error}") from error
        return Built(entry=_ENTRY, runtime=f"onnxruntime {onnxruntime.__version__}")

    def load(self, engine: Stored[Engine], *, num_threads: int, num_streams: int = 1) -> _Predictor:
        """Open an engine; raises EngineUnavailable where the runtime is not installed."""
        try:
            # Calls from several threads at once share the runtime's threads.
            return _Predictor(
                self._session(engine.folder / engine.record.entry, num_threads=max(1, num_threads // num_streams))
            )
        except ImportError as error:
            raise EngineUnavailable(
                f"onnxruntime is not installed ({error}); run: python -m pip install onnxruntime"
            ) from error

    def _session(self, path: Path, *, num_threads: int) -> Any:
        import onnxruntime

        level = onnxruntime.GraphOptimizationLevel
        levels = {"none": level.ORT_DISABLE_ALL, "basic": level.ORT_ENABLE_BASIC, "all": level.ORT_ENABLE_ALL}
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = levels[self.rewriting]
        options.intra_op_num_threads = num_threads
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class _Predictor:
    def __init__(self, session: Any) -> None:
        self._session = session

    def predict(self, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """uint8 images (n, h, w, c) to logits (n, classes) and embeddings (n, embedding_dim)."""
        logits, embedding = self._session.run(["logits", "embedding"], {"images": images})
        return logits, embedding
