"""A process that trains trials: reads the place and then one trial a line, and tells what happens, a line each.

Lines of JSON in both directions. It ends when its standard input does: then the search that started it is gone.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from components import collector
from components.contracts.errors import VisionloopError
from flows.tuning.trial import Place, Trainer, told_error
from flows.workspace.recipes import RunConfig

_EVERY_S = 0.5


def main() -> None:
    """Train what standard input asks for."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    threading.Thread(target=_read, args=(lines,), daemon=True).start()

    def tell(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    def on_epoch(row: Mapping[str, float]) -> bool:
        tell(epoch=dict(row))
        return bool(json.loads(lines.get())["go_on"])

    last = 0.0

    def progress(done: int, total: int, note: str = "") -> None:
        nonlocal last
        if time.monotonic() - last > _EVERY_S:
            last = time.monotonic()
            tell(progress=[done, total, note])

    try:
        trainer = Trainer(Place(**json.loads(lines.get())))
        while True:
            order = json.loads(lines.get())
            config = RunConfig.model_validate_json(json.dumps(order["config"]), strict=True)
            tell(result=trainer.train(order["number"], config, on_epoch, progress).to_json())
    except VisionloopError as error:
        tell(error=told_error(error))


def _read(lines: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


if __name__ == "__main__":
    collector.skip_at_exit()
    main()
