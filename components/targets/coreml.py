"""Core ML, Apple's runtime: an ML Program that takes an image and is executed on Apple's systems alone.

What cannot be executed here is compared instead: the written package's inputs, outputs, scaling, weights and class labels
with the checkpoint. That is no parity, and its facts (`weights_compared`) do not say so. coremltools runs in the environment
`coreml`: it is tried with older releases of torch than ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NoReturn

from pydantic import BaseModel, ConfigDict

from components import environments
from components.contracts.errors import EngineUnavailable
from components.contracts.families import Built, ExportRequest
from components.contracts.models import Engine
from components.contracts.records import Stored
from components.store import sha256_file

_PACKAGE = "model.mlpackage"
_ENVIRONMENT = "coreml"


class Target(BaseModel):
    """fp32, or fp16, which Apple's neural engine computes in. The input is an image (uint8, RGB or grey), one at a time."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    precisions: tuple[Literal["fp32", "fp16"], ...] = ("fp32", "fp16")
    minimum_ios: Literal[16, 17, 18] = 16
    """The oldest system that opens it; iOS 16 is macOS 13."""

    def built_by(self) -> str:
        return f"{_ENVIRONMENT} {sha256_file(environments.lock(_ENVIRONMENT))}"

    def absent(self) -> str:
        return environments.absent(_ENVIRONMENT)

    def export(self, request: ExportRequest, *, out: Path) -> Built:
        import torch

        from components.checkpoints import OfPlanes, restore, save_weights
        from components.converters import coreml
        from components.graphs import to_program
        from components.weights import from_safetensors

        record = request.checkpoint.record
        size = record.preprocessing
        shape = (1, size.channels, size.height, size.width)
        program = out / "program.pt2"
        to_program(OfPlanes(restore(request.checkpoint)), torch.zeros(shape), program)
        # The checkpoint's own may be packed, and what converts knows nothing of that.
        weights = out / save_weights(from_safetensors(request.checkpoint.folder / record.weights.name), out=out).name
        asked = {
            "program": str(program),
            "weights": str(weights),
            "prefix": "model.",
            "shape": shape,
            "precision": request.precision,
            "minimum_ios": self.minimum_ios,
            "classes": list(record.classes),
            "embedding_dim": record.embedding_dim,
            "preprocessing": size.to_json(),
            "out": str(out / _PACKAGE),
        }
        answer = environments.convert(_ENVIRONMENT, coreml, asked)
        program.unlink()
        weights.unlink()
        return Built(entry=f"{_PACKAGE}/Manifest.json", runtime=answer["runtime"], facts=answer["facts"])

    def load(self, engine: Stored[Engine], *, num_threads: int, num_streams: int = 1) -> NoReturn:
        raise EngineUnavailable("built, not executed here: Core ML runs on Apple's systems alone")
