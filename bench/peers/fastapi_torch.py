"""FastAPI with the torch model itself: what people write first."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from bench.peers.fastapi_engine import application_of, serve

SETTINGS = {
    "1 process, 2 threads": {"workers": 1, "threads": 2},
    "2 processes, 1 thread each": {"workers": 2, "threads": 1},
}


def application() -> FastAPI:
    """The app of one worker process; PEER_RELEASE is the folder of the torch reference engine."""
    import numpy as np
    import torch

    from components.checkpoints import restore
    from components.contracts.models import Checkpoint
    from components.contracts.records import Stored
    from components.images import decode, prepare

    folder = Path(os.environ["PEER_RELEASE"])
    record = Checkpoint.read(json.loads((folder / "checkpoint.json").read_text()))
    torch.set_num_threads(SETTINGS[os.environ["PEER_SETTING"]]["threads"])
    model = restore(Stored(record, folder))

    def one(data: bytes) -> dict[str, Any]:
        pixels = prepare(decode(data), record.preprocessing)
        with torch.inference_mode():
            logits, _ = model(torch.from_numpy(np.ascontiguousarray(pixels[None])))
        probabilities = torch.softmax(logits / record.temperature, dim=1)[0]
        return {"label": record.classes[int(probabilities.argmax())], "probabilities": probabilities.tolist()}

    return application_of(one)


if __name__ == "__main__":
    os.environ["PEER_RELEASE"], port, os.environ["PEER_SETTING"] = sys.argv[1:]
    serve("bench.peers.fastapi_torch:application", SETTINGS[os.environ["PEER_SETTING"]]["workers"], int(port))
