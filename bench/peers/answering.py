"""A JPEG to a label with the engine of a release: what every peer does with a request."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np

from components.contracts.models import Engine
from components.contracts.records import Stored
from components.contracts.releases import Release
from components.images import decode, prepare
from components.targets.openvino import Target


class Answering:
    """Loads the engine with so many threads and streams."""

    def __init__(self, release: Path, *, num_threads: int, num_streams: int = 1) -> None:
        self.record = Release.read(json.loads((release / "manifest.json").read_text())["record"])
        engine: Engine = self.record.engine
        self._predictor: Any = Target(**engine.settings).load(
            Stored(engine, release / "engine"), num_threads=num_threads, num_streams=num_streams
        )
        self.lock = threading.Lock()

    def pixels(self, data: bytes) -> Any:
        return prepare(decode(data), self.record.engine.preprocessing)

    def batch(self, pixels: list[Any]) -> list[dict[str, Any]]:
        logits, _ = self._predictor.predict(np.stack(pixels))
        scaled = logits / self.record.engine.temperature
        exponent = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        probabilities = exponent / exponent.sum(axis=1, keepdims=True)
        classes = self.record.engine.classes
        return [{"label": classes[int(p.argmax())], "probabilities": [round(float(x), 6) for x in p]} for p in probabilities]

    def one(self, data: bytes) -> dict[str, Any]:
        return self.batch([self.pixels(data)])[0]
