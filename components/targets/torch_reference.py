"""The trained torch module itself as a target: the yardstick that every other engine is compared with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from components.contracts.families import Built, ExportRequest
from components.contracts.models import Checkpoint, Engine
from components.contracts.records import Stored

if TYPE_CHECKING:
    import torch

_ENTRY = "checkpoint.json"


class Target(BaseModel):
    """fp32, eager, on the CPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    precisions: tuple[Literal["fp32"], ...] = ("fp32",)

    def built_by(self) -> str:
        return ""

    def absent(self) -> str:
        return ""

    def export(self, request: ExportRequest, *, out: Path) -> Built:
        import torch

        checkpoint = request.checkpoint
        shutil.copy(checkpoint.folder / checkpoint.record.weights.name, out / checkpoint.record.weights.name)
        (out / _ENTRY).write_text(json.dumps(checkpoint.record.to_json()))
        return Built(entry=_ENTRY, runtime=f"torch {torch.__version__}")

    def load(self, engine: Stored[Engine], *, num_threads: int, num_streams: int = 1) -> _Predictor:
        import torch

        from components.checkpoints import restore

        torch.set_num_threads(max(1, num_threads // num_streams))
        record = Checkpoint.read(json.loads((engine.folder / engine.record.entry).read_text()))
        return _Predictor(restore(Stored(record, engine.folder)))


class _Predictor:
    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def predict(self, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        import torch

        with torch.inference_mode():
            logits, embedding = self._model(torch.from_numpy(np.ascontiguousarray(images)))
        return logits.numpy(), embedding.numpy()
