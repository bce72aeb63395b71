"""The process that holds a training's job on a Ray cluster: `python -m components.ray_job REQUEST`.

Ray wants a process of its own, and when that ends, however it does, the cluster ends the job's workers. What they say comes
by a queue of the cluster, since they may be on other machines.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from components.compute import PLACE, ComputeConfig, resolve
from components.contracts.errors import ClusterUnavailable, ConfigError, WorkerLost
from components.launching import Line, Telling
from components.ray_cluster import expect_alike, versions

_PROGRESS_S = 0.2
"""Each word goes through the cluster, and a training has many steps."""


class Told(Telling):
    """What a worker says, by the queue; a worker whose queue is gone has no training to work for any more."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self._last = 0.0

    def say(self, kind: str, **told: Any) -> None:
        try:
            self._queue.put((kind, told))
        except Exception:
            os._exit(1)

    def progress(self, done: int, total: int, note: str = "") -> None:
        if note or done == total or time.monotonic() - self._last > _PROGRESS_S:
            self._last = time.monotonic()
            super().progress(done, total, note)


def on_cluster(config: dict[str, Any]) -> None:
    """What each worker of the cluster runs, in a process group that Ray made."""
    import ray.train.torch
    from ray.runtime_context import get_runtime_context

    from components.training_worker import work

    request, told = config["request"], Told(config["queue"])
    try:
        expect_able(request, f"node {get_runtime_context().get_node_id()}")
    except ClusterUnavailable as error:
        told.failed(error, "", lost_another=False)
        raise
    if not work(request, told, device=str(ray.train.torch.get_device())):
        raise RuntimeError("a worker failed, and has said why")


def expect_able(request: dict[str, Any], node: str) -> None:
    """Raise ClusterUnavailable on a machine that cannot train what is asked, which is no fault of the recipe's values."""
    expect_alike(request, node, versions())
    try:
        resolve(ComputeConfig.model_validate_json(json.dumps(request["config"].get("compute", {})), strict=True))
    except ConfigError as error:
        raise ClusterUnavailable(f"the Ray worker on {node} cannot train this: {error}") from None


def join(address: str) -> None:
    """Make this process a job of the cluster at an address; raises ClusterUnavailable."""
    import ray

    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        said = " ".join(str(error).split())[:300]
        raise ClusterUnavailable(f"the Ray cluster at {address} takes no job from here: {said}") from error


def _hold(request: dict[str, Any], line: Line) -> None:
    """Ask the cluster for the workers, pass on what they say, and tell how they ended."""
    import ray
    from ray.util.queue import Empty, Queue

    join(request["ray_address"])
    _expect_room(request, ray.cluster_resources())  # type: ignore[no-untyped-call]
    queue = Queue(actor_options={"num_cpus": 0})
    ended: list[Exception | None] = []

    def fit() -> None:
        try:
            _trainer(request, queue).fit()
        except Exception as error:
            ended.append(error)
        else:
            ended.append(None)

    threading.Thread(target=fit, daemon=True).start()
    failed = False
    while True:
        over = bool(ended)
        try:
            kind, told = queue.get(timeout=0.2)
        except Empty:
            if over:
                break
            continue
        # What a worker says of one that is gone does not tell what became of that.
        failed |= kind == "error" and not told["lost_another"]
        line.say(kind, **told)
    if failed or ended[0] is None:
        line.say("through")
        return
    said = (str(ended[0]).strip().splitlines() or [type(ended[0]).__name__])[-1][:300]
    raise WorkerLost(
        f"a worker on the Ray cluster ended before its end ({said}), and the others were ended; run again to go on from the "
        f"last checkpoint"
    )


def _expect_room(request: dict[str, Any], there: dict[str, float]) -> None:
    """Raise ClusterUnavailable for what the cluster never has; what others use now is waited for."""
    wanted = {"CPU": request["processes"] * request["cpus"], "GPU": request["processes"] * request["gpus"]}
    lacking = [
        f"{number} {kind}s (it has {there.get(kind, 0):g})" for kind, number in wanted.items() if number > there.get(kind, 0)
    ]
    if lacking:
        raise ClusterUnavailable(
            f"{PLACE}.processes: the Ray cluster at {request['ray_address']} is too small for {request['processes']} "
            f"workers, which need {' and '.join(lacking)}; lower processes or VISIONLOOP_NUM_THREADS, or add machines"
        )


def _trainer(request: dict[str, Any], queue: Any) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpus = request["gpus"]
    each = {"CPU": request["cpus"], **({"GPU": gpus} if gpus else {})}
    return TorchTrainer(
        importlib.import_module("components.ray_job").on_cluster,  # by its name, which this module has not when it is run
        train_loop_config={"request": request, "queue": queue},
        scaling_config=ScalingConfig(num_workers=request["processes"], use_gpu=bool(gpus), resources_per_worker=each),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
        run_config=RunConfig(name="run", storage_path=request["shared"], failure_config=FailureConfig(max_failures=0)),
    )


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    holding = Line(asked["socket"])
    try:
        _hold(asked, holding)
    except Exception as problem:
        holding.failed(problem, traceback.format_exc(), lost_another=False)
        sys.exit(1)
