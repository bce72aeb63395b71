"""Ray Serve: replicas, and batching by its decorator."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from bench.peers.answering import Answering

SETTINGS = {
    "2 replicas, 1 thread each": {"replicas": 2, "threads": 1, "batch": 0},
    "1 replica, 2 threads, batches of 8 within 5 ms": {"replicas": 1, "threads": 2, "batch": 8},
    "2 replicas, batches of 8 within 5 ms": {"replicas": 2, "threads": 1, "batch": 8},
}


@serve.deployment(max_ongoing_requests=64, logging_config={"enable_access_log": False})
class Peer:
    """The engine in a replica."""

    def __init__(self, release: str, threads: int, batch: int) -> None:
        self.engine, self.batching = Answering(Path(release), num_threads=threads), batch

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.005)
    async def batched(self, images: list[bytes]) -> list[dict[str, Any]]:
        return self.engine.batch([self.engine.pixels(data) for data in images])

    async def __call__(self, request: Request) -> Any:
        data = await request.body()
        return await self.batched(data) if self.batching else self.engine.one(data)


if __name__ == "__main__":
    release, port, name = sys.argv[1:]
    setting = SETTINGS[name]
    ray.init(num_cpus=4, include_dashboard=False, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(
        Peer.options(num_replicas=setting["replicas"]).bind(release, setting["threads"], setting["batch"]),  # type: ignore[attr-defined]
        route_prefix="/predict",
    )
    while True:
        time.sleep(1)
