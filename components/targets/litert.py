"""LiteRT, the runtime of TFLite files on phones and small boards: fp32, executed here by its interpreter on the CPU.

litert-torch, which writes the file, needs older libraries than ours: it runs in the environment `litert`.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from components import environments
from components.contracts.errors import EngineUnavailable
from components.contracts.families import Built, ExportRequest
from components.contracts.models import Engine
from components.contracts.records import Stored
from components.store import sha256_file

_ENTRY = "model.tflite"
_ENVIRONMENT = "litert"


class Target(BaseModel):
    """One image at a time, as a camera gives them; a batch is answered image by image."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    precisions: tuple[Literal["fp32"], ...] = ("fp32",)

    def built_by(self) -> str:
        return f"{_ENVIRONMENT} {sha256_file(environments.lock(_ENVIRONMENT))}"

    def absent(self) -> str:
        return environments.absent(_ENVIRONMENT)

    def export(self, request: ExportRequest, *, out: Path) -> Built:
        import torch

        from components.checkpoints import restore
        from components.converters import litert
        from components.graphs import to_program

        size = request.checkpoint.record.preprocessing
        shape = (1, size.height, size.width, size.channels)
        program = out / "program.pt2"
        to_program(restore(request.checkpoint), torch.zeros(shape, dtype=torch.uint8), program)
        asked = {"program": str(program), "shape": shape, "out": str(out / _ENTRY)}
        answer = environments.convert(_ENVIRONMENT, litert, asked)
        program.unlink()
        return Built(entry=_ENTRY, runtime=answer["runtime"])

    def load(self, engine: Stored[Engine], *, num_threads: int, num_streams: int = 1) -> _Predictor:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise EngineUnavailable(
                f"built, not executed here: ai-edge-litert is not installed ({error}); "
                f"run: python -m pip install ai-edge-litert"
            ) from error
        path = engine.folder / engine.record.entry
        return _Predictor(Interpreter, path, max(1, num_threads // num_streams))


class _Predictor:
    def __init__(self, interpreter: Any, path: Path, num_threads: int) -> None:
        self._interpreter, self._path, self._num_threads = interpreter, path, num_threads
        self._own = threading.local()
        self._runner()

    def _runner(self) -> Any:
        """An interpreter holds its own tensors: one for each thread that calls."""
        if not hasattr(self._own, "runner"):
            self._own.interpreter = self._interpreter(model_path=str(self._path), num_threads=self._num_threads)
            self._own.runner = self._own.interpreter.get_signature_runner()
        return self._own.runner

    def predict(self, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        run = self._runner()
        answers = [run(images=np.ascontiguousarray(image[None])) for image in images]
        return np.concatenate([a["logits"] for a in answers]), np.concatenate([a["embedding"] for a in answers])
