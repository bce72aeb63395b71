"""FastAPI with the torch model itself: what people write first."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool

SETTINGS = {
    "1 process, 2 threads": {"workers": 1, "threads": 2},
    "2 processes, 1 thread each": {"workers": 2, "threads": 1},
}


def application() -> FastAPI:
    """The app of one worker process; PEER_RELEASE is the folder of the torch reference engine."""
    import numpy as np
    import torch

    from components.checkpoints import restore
    from components.contracts import Checkpoint, Stored
    from components.images import decode, prepare

    folder = Path(os.environ["PEER_RELEASE"])
    record = Checkpoint.read(json.loads((folder / "checkpoint.json").read_text()))
    torch.set_num_threads(SETTINGS[os.environ["PEER_SETTING"]]["threads"])
    model = restore(Stored(record, folder))
    app = FastAPI()

    def one(data: bytes) -> dict[str, Any]:
        pixels = prepare(decode(data), record.preprocessing)
        with torch.inference_mode():
            logits, _ = model(torch.from_numpy(np.ascontiguousarray(pixels[None])))
        probabilities = torch.softmax(logits / record.temperature, dim=1)[0]
        return {"label": record.classes[int(probabilities.argmax())], "probabilities": probabilities.tolist()}

    @app.post("/predict")
    async def predict(request: Request) -> Any:
        return await run_in_threadpool(one, await request.body())

    @app.get("/ready")
    def ready() -> dict[str, bool]:
        return {"ready": True}

    return app


if __name__ == "__main__":
    os.environ["PEER_RELEASE"], port, os.environ["PEER_SETTING"] = sys.argv[1:]
    uvicorn.run(
        "bench.peers.fastapi_torch:application",
        factory=True,
        port=int(port),
        workers=SETTINGS[os.environ["PEER_SETTING"]]["workers"],
        access_log=False,
        log_level="error",
    )
