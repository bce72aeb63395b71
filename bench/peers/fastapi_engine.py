"""FastAPI on uvicorn with the engine in its thread pool: what a careful engineer writes by hand."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
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


def application_of(one: Callable[[bytes], Any]) -> FastAPI:
    """An app that answers a posted picture by `one`, in the thread pool."""
    app = FastAPI()

    @app.post("/predict")
    async def predict(request: Request) -> Any:
        return await run_in_threadpool(one, await request.body())

    return app


def serve(factory: str, workers: int, port: int) -> None:
    """Run an app's factory in so many processes."""
    uvicorn.run(factory, factory=True, port=port, workers=workers, access_log=False, log_level="error")


def application() -> FastAPI:
    """The app of one worker process."""
    setting = SETTINGS[os.environ["PEER_SETTING"]]
    engine = Answering(Path(os.environ["PEER_RELEASE"]), num_threads=setting["threads"], num_streams=setting["streams"])
    return application_of(engine.one)


if __name__ == "__main__":
    os.environ["PEER_RELEASE"], port, os.environ["PEER_SETTING"] = sys.argv[1:]
    serve("bench.peers.fastapi_engine:application", SETTINGS[os.environ["PEER_SETTING"]]["workers"], int(port))
