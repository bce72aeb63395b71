"""Runs an ONNX engine as visionloop's target does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

PACKAGE = "onnxruntime"
"""What has to be installed, at the version that answered the golden pictures."""


def load(entry: Path, num_threads: int) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]:
    """From uint8 images (n, h, w, c) to logits (n, classes); raises ImportError without the runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(entry), options, providers=["CPUExecutionProvider"])

    def answer(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = session.run(["logits"], {"images": images})[0]
        return found

    return answer
