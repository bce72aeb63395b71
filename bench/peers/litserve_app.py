"""LitServe: workers and dynamic batching as its documentation has them."""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

import litserve

from bench.peers.answering import Answering

SETTINGS = {
    "1 worker, 2 threads": {"workers": 1, "threads": 2, "batch": 1},
    "2 workers, 1 thread each": {"workers": 2, "threads": 1, "batch": 1},
    "2 workers, batches of 8 within 5 ms": {"workers": 2, "threads": 1, "batch": 8},
}


class Api(litserve.LitAPI):
    """The picture is decoded in the worker."""

    def __init__(self, release: Path, threads: int, **options: Any) -> None:
        super().__init__(**options)
        self.release, self.threads = release, threads

    def setup(self, device: str) -> None:
        self.engine = Answering(self.release, num_threads=self.threads)

    def decode_request(self, request: dict[str, str]) -> bytes:
        # Raw bodies are not among what it takes: its documentation sends pictures as base64 in JSON.
        return base64.b64decode(request["image"])

    def batch(self, inputs: list[Any]) -> Any:
        return inputs

    def predict(self, x: Any) -> Any:
        if isinstance(x, list):
            return self.engine.batch([self.engine.pixels(data) for data in x])
        return self.engine.one(x)

    def unbatch(self, output: Any) -> Any:
        return output

    def encode_response(self, output: Any) -> Any:
        return output


if __name__ == "__main__":
    release, port, name = sys.argv[1:]
    setting = SETTINGS[name]
    api = Api(
        Path(release),
        setting["threads"],
        max_batch_size=setting["batch"],
        batch_timeout=0.005 if setting["batch"] > 1 else 0.0,
    )
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=setting["workers"], timeout=30)
    server.run(
        port=int(port),
        host="127.0.0.1",
        log_level="error",
        access_log=False,
        generate_client_file=False,
        api_server_worker_type="thread",
    )
