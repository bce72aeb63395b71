"""One trial: the stage training with the trial's values, through the store, so that what was trained before costs nothing.

A trial is told of every epoch and may be stopped by the answer; what it had written is removed then. One that is killed
leaves its checkpoints, and whoever takes the trial up goes on from them. Neither engines nor test images are touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from components.contracts.data import DataVersion, Splits
from components.contracts.errors import (
    CheckpointMismatch,
    ClusterUnavailable,
    ConfigError,
    StoreError,
    TrainingDiverged,
    VisionloopError,
    WeightsUnavailable,
    WorkerLost,
)
from components.contracts.models import Checkpoint
from components.contracts.progress import Progress, StoppedEarly
from components.contracts.records import Record, Stored
from components.hooks import LEFTOVERS
from components.segments import limit
from components.training import train
from flows.terminal import Console
from flows.training import keys
from flows.training.given_models import expect_to_teach
from flows.training.given_models import teacher as learned_from
from flows.training.run import Run
from flows.workspace.recipes import RunConfig
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace

LOCKS = ".locks"
"""Folder of the studies in which each training that goes on has a file."""
OnEpoch = Callable[[Mapping[str, float]], bool]
"""Hears the row of an epoch, and answers whether the trial goes on."""
ITS_OWN = (TrainingDiverged, ConfigError, CheckpointMismatch)
"""Errors of a trial's values: the search goes on. All others would meet the next trial as well."""
_NAMED = {kind.__name__: kind for kind in (ClusterUnavailable, StoreError, WeightsUnavailable, WorkerLost)}


class TrialResult(Record):
    """What came of a trial."""

    state: Literal["complete", "pruned", "failed"]
    reason: str = ""
    """Why it failed."""
    weights: str = ""
    """sha256 of what was trained."""
    artefact: str = ""
    """Its folder in the store's folder of trainings."""
    history: tuple[dict[str, float], ...] = ()
    valid: dict[str, float] = {}
    """The metrics of the best epoch on the valid split."""
    seconds: float = 0.0
    cached: bool = False
    """Whether it had been trained before."""


@dataclass(frozen=True)
class Place:
    """Where the trials of a search are trained: all that another process needs to know, as JSON."""

    root: str
    data: Mapping[str, Any]
    """The data version."""
    splits: str
    """Key of the splits in the store."""
    num_threads: int
    device: str = ""
    """The GPU that this search is for, as a training's key names it; empty for the processor."""
    gpus: int = 0
    """How many of them each worker needs."""

    @classmethod
    def of(cls, run: Run, splits: Stored[Splits], num_threads: int) -> Self:
        config, device = run.config.training.compute, run.compute.key
        gpus = config.processes if device and config.launcher != "ray" else 0
        return cls(str(run.workspace.root), run.data.to_json(), splits.folder.name, num_threads, device, gpus)


class Trainer:
    """Trains trials in this process, one after the other."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.workspace = Workspace.find(Path(place.root))
        self.settings = replace(read_settings(self.workspace.state), num_threads=place.num_threads)
        self.data = DataVersion.read(place.data)
        limit(self.workspace.cache, self.settings.cache_bytes)
        found = self.workspace.store.open("splitting", place.splits, Splits)
        if found is None:
            raise StoreError(f"the splits {place.splits} of this search are not in {self.workspace.store.root} any more")
        self.splits: Stored[Splits] = found

    def train(self, number: int, config: RunConfig, on_epoch: OnEpoch, progress: Progress) -> TrialResult:
        """Train a trial; raises what is not the fault of its values, such as StoreError on a full disk."""
        folder = self.workspace.studies / ".trials" / f"{os.getpid()}-{number}"
        run = Run(self.workspace, config, self.data, self.settings, Console(1, quiet=True), folder=folder)
        if run.compute.key != self.place.device:
            raise ConfigError(
                f"a worker trains on {run.compute.hardware or 'the processor'}, and the search "
                f"began on {self.place.device.removeprefix('cuda ') or 'the processor'}: trials of different devices do not "
                f"compare; set CUDA_VISIBLE_DEVICES to GPUs of one kind"
            )
        if config.training.teacher is not None:
            root, cache = self.workspace.root, self.workspace.cache
            run.teacher = learned_from(config.training.teacher, self.data, run=folder, root=root, cache=cache)
            expect_to_teach(run.teacher, run.task.classes(self.splits.record.classes), config.training.task)
        inputs = keys.training_inputs(run, self.splits)
        key, began = keys.training_key(run, self.splits), time.monotonic()
        rows: list[dict[str, float]] = []
        computed: list[bool] = []

        def compute(out: Path, _: Progress) -> Checkpoint:
            computed.append(True)
            return train(
                self.splits,
                self.workspace.data,
                config.training,
                out=out,
                cache=self.workspace.cache,
                root=self.workspace.root,
                num_threads=self.settings.num_threads,
                sink=_Reporting(rows, on_epoch),
                progress=progress,
                teacher=run.teacher.fetch() if run.teacher else None,
                teacher_renamed=run.teacher.renamed if run.teacher else (),
                plugin_folder=run.plugin_folder,
                ray_address=self.settings.ray_address,
            )

        def spent() -> float:
            return round(time.monotonic() - began, 3)

        try:
            with _alone(self.workspace.studies / LOCKS, key):
                stored = run.stage("training", Checkpoint, compute, inputs=inputs, leftovers=LEFTOVERS)
        except StoppedEarly:
            run.store.give_up("training", key)
            return TrialResult(state="pruned", history=tuple(rows), seconds=spent())
        except ITS_OWN as error:
            run.store.give_up("training", key)
            return TrialResult(state="failed", reason=str(error), history=tuple(rows), seconds=spent())
        finally:
            _remove_links(folder)
        return TrialResult(
            state="complete",
            weights=stored.record.weights.sha256,
            artefact=stored.folder.name,
            history=tuple(json.loads((stored.folder / stored.record.history.name).read_text())),
            valid=dict(stored.record.valid_metrics),
            seconds=spent(),
            cached=not computed,
        )


@dataclass(frozen=True)
class _Reporting:
    """A sink that keeps the rows, and ends the training when that is the answer."""

    rows: list[dict[str, float]]
    on_epoch: OnEpoch

    def log(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.rows.append(dict(metrics))
        if not self.on_epoch(metrics):
            raise StoppedEarly


@contextlib.contextmanager
def _alone(folder: Path, key: str) -> Iterator[None]:
    """Two trials of the same values would write the same checkpoints: the second waits, and finds what was trained."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / key).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_links(folder: Path) -> None:
    """A trial is listed by its study, not by a folder."""
    for link in folder.glob("*"):
        link.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def told_error(error: VisionloopError) -> dict[str, str]:
    """An error that ends a search, for another process."""
    return {"kind": type(error).__name__, "message": str(error)}


def error_of(told: Mapping[str, str]) -> VisionloopError:
    """The error that another process told."""
    return _NAMED.get(told["kind"], VisionloopError)(told["message"])
