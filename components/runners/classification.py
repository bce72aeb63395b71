"""Reads the logits of a classifier: the likeliest class and its probability."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def read(logits: npt.NDArray[np.float32], temperature: float, classes: Sequence[str]) -> list[tuple[str, float]]:
    """Label and confidence of each row of logits (n, classes)."""
    scaled = logits.astype(np.float64) / temperature
    exponent = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    probabilities = (exponent / exponent.sum(axis=1, keepdims=True)).astype(np.float32)
    best = probabilities.argmax(axis=1)
    return [(classes[place], float(row[place])) for row, place in zip(probabilities, best, strict=True)]
