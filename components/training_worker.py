"""One of the processes of a training, which `torchrun` starts (`-m components.training_worker REQUEST`) or a Ray cluster.

All of them run the same training on shares of each batch; the first alone writes.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from components import plugins, segments
from components.collectives import is_of_another, joined
from components.compute import resolve
from components.contracts.data import Renames, Splits
from components.contracts.models import Checkpoint
from components.contracts.progress import NullSink, silent
from components.contracts.records import RecordT, Stored
from components.launching import Line, Telling
from components.training import TrainingConfig, train_here


def work(request: dict[str, Any], line: Telling, device: str | None = None) -> bool:
    """Train as a request says, on a device or the GPU of this process's number, and tell what came of it.

    False where it failed.
    """
    try:
        checkpoint = _train(request, line, device)
    except Exception as error:
        line.failed(error, traceback.format_exc(), lost_another=is_of_another(error))
        return False
    if checkpoint is not None:
        line.answer(checkpoint.to_json())
    line.through()
    return True


def _train(request: dict[str, Any], line: Telling, device: str | None) -> Checkpoint | None:
    import torch

    config = TrainingConfig.model_validate_json(json.dumps(request["config"]), strict=True)
    plugins.use_workspace(Path(request["plugins"]) if request["plugins"] else None)
    if request["cache_bytes"] is not None:
        segments.limit(Path(request["cache"]), request["cache_bytes"])
    compute = joined(resolve(config.compute), device)
    torch.set_num_threads(max(1, request["num_threads"] // compute.num_processes))
    return train_here(
        _stored(request["splits"], Splits),
        Path(request["data"]),
        config,
        compute,
        out=Path(request["out"]),
        cache=Path(request["cache"]),
        root=Path(request["root"]),
        num_threads=request["num_threads"],
        sink=line if compute.rank == 0 else NullSink(),
        progress=line.progress if compute.rank == 0 else silent,
        champion=_stored(request["champion"], Checkpoint) if request["champion"] else None,
        renamed=_renames(request["renamed"]),
        teacher=_stored(request["teacher"], Checkpoint) if request["teacher"] else None,
        teacher_renamed=_renames(request["teacher_renamed"]),
    )


def _stored(told: dict[str, Any], record: type[RecordT]) -> Stored[RecordT]:
    return Stored(record.read(told["record"]), Path(told["folder"]))


def _renames(told: list[list[str]]) -> Renames:
    return tuple((old, new) for old, new in told)


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    sys.exit(0 if work(asked, Line(asked["socket"])) else 1)
