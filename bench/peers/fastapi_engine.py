"""FastAPI on uvicorn with the engine in its thread pool: what a careful engineer writes by hand."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool

from bench.peers.answering import Answering

SETTINGS = {
    "1 process, 2 streams": {"workers": 1, "threads": 2, "streams": 2},
    "2 processes, 1 thread each": {"workers": 2, "threads": 1, "streams": 1},
}


def application() -> FastAPI:
    """The app of one worker process."""
    setting = SETTINGS[os.environ["PEER_SETTING"]]
    engine = Answering(Path(os.environ["PEER_RELEASE"]), num_threads=setting["threads"], num_streams=setting["streams"])
    app = FastAPI()

    @app.post("/predict")
    async def predict(request: Request) -> Any:
        return await run_in_threadpool(engine.one, await request.body())

    @app.get("/ready")
    def ready() -> dict[str, bool]:
        return {"ready": True}

    return app


if __name__ == "__main__":
    os.environ["PEER_RELEASE"], port, os.environ["PEER_SETTING"] = sys.argv[1:]
    uvicorn.run(
        "bench.peers.fastapi_engine:application",
        factory=True,
        port=int(port),
        workers=SETTINGS[os.environ["PEER_SETTING"]]["workers"],
        access_log=False,
        log_level="error",
    )
