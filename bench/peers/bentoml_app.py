"""BentoML: a service with adaptive batching, and one without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bentoml

from bench.peers.answering import Answering

SETTINGS = {
    "2 workers, 1 thread each": {"workers": 2, "threads": 1, "batch": 0},
    "1 worker, 2 threads, adaptive batches of 8": {"workers": 1, "threads": 2, "batch": 8},
    "2 workers, adaptive batches of 8": {"workers": 2, "threads": 1, "batch": 8},
}
SETTING = SETTINGS[os.environ.get("PEER_SETTING", next(iter(SETTINGS)))]


@bentoml.service(workers=SETTING["workers"], traffic={"timeout": 30}, logging={"access": {"enabled": False}})
class Peer:
    """The engine behind one endpoint."""

    def __init__(self) -> None:
        self.engine = Answering(Path(os.environ["PEER_RELEASE"]), num_threads=SETTING["threads"])

    if SETTING["batch"]:

        @bentoml.api(route="/predict", batchable=True, max_batch_size=8, max_latency_ms=1000)
        def predict(self, images: list[Path]) -> list[dict[str, Any]]:
            return self.engine.batch([self.engine.pixels(path.read_bytes()) for path in images])

    else:

        @bentoml.api(route="/predict")
        def predict_one(self, image: Path) -> dict[str, Any]:
            return self.engine.one(image.read_bytes())


if __name__ == "__main__":
    os.environ["PEER_RELEASE"], port, os.environ["PEER_SETTING"] = sys.argv[1:]
    command = [sys.executable, "-m", "bentoml", "serve", "bench.peers.bentoml_app:Peer", "--port", port]
    sys.exit(subprocess.call([*command, "--host", "127.0.0.1"]))
