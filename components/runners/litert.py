"""Runs a TFLite engine by LiteRT's interpreter as visionloop's target does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

PACKAGE = "ai-edge-litert"
"""What has to be installed, at the version that answered the golden pictures."""


def load(entry: Path, num_threads: int) -> Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]:
    """From uint8 images (n, h, w, c) to logits (n, classes), one by one; raises ImportError without the runtime."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(entry), num_threads=num_threads)
    runner = interpreter.get_signature_runner()

    def answer(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        assert interpreter is not None  # which the runner does not keep alive
        return np.concatenate([runner(images=np.ascontiguousarray(image[None]))["logits"] for image in images])

    return answer
