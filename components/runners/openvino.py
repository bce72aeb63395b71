"""Runs an OpenVINO engine as visionloop's target does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

PACKAGE = "openvino"
"""What has to be installed, at the version that answered the golden pictures."""


def load(entry: Path, num_threads: int) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]:
    """From uint8 images (n, h, w, c) to logits (n, classes); raises ImportError without the runtime."""
    # OpenVINO reports to an analytics service as soon as it is imported, unless a file in the person's home says no. It
    # takes a missing reporter for a choice.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    # On processors with AMX the default is bf16, which is not what the engine was judged by.
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": num_threads}
    request = openvino.Core().compile_model(entry, "CPU", settings).create_infer_request()

    def answer(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = request.infer({"images": images})["logits"].copy()
        return found

    return answer
