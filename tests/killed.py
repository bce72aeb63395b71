"""A training in processes that are killed at chosen moments: half-way through a file, at a rename, at a removal, in a step.

The libraries are loaded once, in a process without threads that forks a child an attempt; a child kills itself by SIGKILL,
so nothing of it is cleaned up. Run as a program: one attempt a line of JSON in, its exit status and what it did out.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from components.contracts.data import Splits
from components.contracts.models import Checkpoint
from components.contracts.records import Stored
from components.optimisation import OptimisationConfig
from components.training import TrainingConfig


@dataclass(frozen=True)
class Moment:
    """The `nth` time that a process does this to a path, or to a step of a phase; `*` stands for anything."""

    what: Literal["writing", "renaming", "renamed", "removing", "step"]
    """Half of a file is there; all of it under its temporary name; under its own; still there; done and not saved."""
    where: str
    """Below the folder of the attempts, or `PHASE/EPOCH/STEP`."""
    nth: int = 1


@dataclass(frozen=True)
class Attempt:
    """What a process did until it ended, as (what, where), and how it ended: an exit status or minus a signal."""

    status: int
    done: list[tuple[str, str]]


class Trainings:
    """Attempts of one training, each in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def attempt(
        self,
        config: TrainingConfig,
        data: Path,
        folder: Path,
        killed_at: Moment | None = None,
        *,
        optimisation: OptimisationConfig | None = None,
    ) -> Attempt:
        """Train on `data` into `folder`/out with the cache `folder`/cache; goes on from what is there.

        With `optimisation` it is applied to the checkpoint in `data`/trained.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {
            "config": config.to_json(),
            "data": str(data),
            "folder": str(folder),
            "kill": asdict(killed_at) if killed_at else None,
            "optimisation": optimisation.to_json() if optimisation else None,
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        told = self._process.stdout.readline()
        assert told, "the process that starts the attempts died"
        answer = json.loads(told)
        return Attempt(answer["status"], [(what, where) for what, where in answer["done"]])


@contextmanager
def trainings() -> Iterator[Trainings]:
    """Start the process that starts the attempts."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here)])
    process = subprocess.Popen(
        [sys.executable, "-m", "killed"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Of the threads of a process that forks, the child has none.
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    try:
        yield Trainings(process)
    finally:
        process.communicate(timeout=60)


class _Watched:
    """Notes in a file what this process does below a folder, and kills it at one moment."""

    def __init__(self, folder: Path, moment: Moment | None, notes: int) -> None:
        self.folder, self.moment, self.notes = folder, moment, notes
        self.count = 0

    def __call__(self, what: str, where: Path | str) -> bool:
        """Whether it is time to die."""
        if isinstance(where, Path):
            if not where.is_relative_to(self.folder):
                return False
            where = where.relative_to(self.folder).as_posix()
        os.write(self.notes, (json.dumps([what, where]) + "\n").encode())
        moment = self.moment
        if moment is None or moment.what != what or not fnmatch.fnmatchcase(where, moment.where):
            return False
        self.count += 1
        return self.count == moment.nth

    def install(self) -> None:
        from components import fitting

        fsync, replace, unlink, step = os.fsync, os.replace, Path.unlink, fitting._Stepping.__call__

        def synced(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            state = os.fstat(descriptor)
            # Under its temporary name, whose ends are a dot and a random word.
            own = re.fullmatch(r"\.(.+)\.[0-9a-f]{32}\.tmp", path.name)
            if stat.S_ISREG(state.st_mode) and own and self("writing", path.with_name(own[1])):
                os.ftruncate(descriptor, state.st_size // 2)
                _die()
            fsync(descriptor)

        def replaced(source: Any, target: Any) -> None:
            if self("renaming", Path(target)):
                _die()
            replace(source, target)
            if self("renamed", Path(target)):
                _die()

        def unlinked(path: Path, missing_ok: bool = False) -> None:
            if self("removing", path):
                _die()
            unlink(path, missing_ok)

        def stepped(stepping: Any, state: Any, chosen: Any) -> float:
            found = step(stepping, state, chosen)
            if self("step", f"{state.hooks[-1].number}/{state.epoch}/{state.step}"):
                _die()
            return found

        for owner, name, watched in (
            (os, "fsync", synced),
            (os, "replace", replaced),
            (Path, "unlink", unlinked),
            (fitting._Stepping, "__call__", stepped),
        ):
            setattr(owner, name, watched)


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a killed process goes on")


def _train(order: dict[str, Any], notes: int) -> None:
    from components import segments
    from components.optimisation import optimise
    from components.training import train

    data, folder = Path(order["data"]), Path(order["folder"])
    (folder / "out").mkdir(parents=True, exist_ok=True)
    # Several segments of few pictures.
    segments._CHUNK_ROWS = 10
    moment = Moment(**order["kill"]) if order["kill"] else None
    _Watched(folder, moment, notes).install()
    config = TrainingConfig.model_validate_json(json.dumps(order["config"]), strict=True)
    splits = Stored(Splits.read(json.loads((data / "splits.json").read_text())), data)
    if order["optimisation"] is None:
        train(splits, data / "data", config, out=folder / "out", cache=folder / "cache", root=data, num_threads=1)
        return
    passes = OptimisationConfig.model_validate_json(json.dumps(order["optimisation"]), strict=True)
    trained = data / "trained"
    checkpoint = Stored(Checkpoint.read(json.loads((trained / "checkpoint.json").read_text())), trained)
    optimise(checkpoint, splits, data / "data", passes, config, out=folder / "out", cache=folder / "cache", num_threads=1)


def _attempt(order: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            os.dup2(2, 1)  # the answers alone go to the standard output
            _train(order, writing)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as lines:
        done = [json.loads(line) for line in lines]
    return {"status": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "done": done}


_SLOW = (
    "networkx",
    "onnx",
    "onnxscript",
    "openvino",
    "pyarrow.parquet",
    "sklearn.metrics",
    "torch._dynamo",
    "torch.onnx._internal.exporter._core",
    "torchvision.transforms.v2",
)


def _main(lines: Iterable[str]) -> None:
    # What a training imports that takes longest, so that no attempt waits for it.
    for name in ("components.graphs", "components.targets.openvino", *_SLOW):
        importlib.import_module(name)

    for line in lines:
        print(json.dumps(_attempt(json.loads(line))), flush=True)


if __name__ == "__main__":
    _main(sys.stdin)
