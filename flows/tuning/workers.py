"""Who trains the trials of a search: this process, or several that it starts.

A process is told a trial as a line of JSON, tells every epoch as a line, and reads whether it goes on. It ends when its
standard input does, so that none is left behind by a search that is killed.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import IO, Any, Protocol

from components.compute import PLACE, Compute, num_gpus
from components.contracts.errors import ConfigError
from components.contracts.progress import Progress
from components.contracts.wording import counted
from components.ray_cluster import expect_answers
from components.training import TrainingConfig, on_this_machine
from flows.terminal import Say
from flows.tuning.trial import OnEpoch, Place, Trainer, TrialResult, error_of
from flows.workspace.recipes import RunConfig
from flows.workspace.settings import Settings, environment_with, sees_gpus

ON_CLUSTER = "--ray"
"""What puts the workers on a cluster."""


def expect_trainers(config: TrainingConfig, settings: Settings, workers: int, *, ray: bool) -> None:
    """Raise ConfigError or ClusterUnavailable where trials of the recipe cannot be trained where they are to be."""
    if ray and config.compute.launcher == "ray":
        raise ConfigError(
            f"{ON_CLUSTER} puts the workers of the search on the Ray cluster, and with {PLACE}.launcher: ray every training "
            f"is there already; leave out {ON_CLUSTER}, or set launcher to local"
        )
    if ray and config.compute.device != "cpu":
        # No GPU is asked for: a worker may come to a machine that has none, where `auto` is the processor without a word.
        raise ConfigError(
            f"{ON_CLUSTER} asks the Ray cluster for processors alone, and {PLACE}.device is {config.compute.device}; set it "
            f"to cpu, or search without {ON_CLUSTER} by {PLACE}.launcher: ray, which asks for GPUs"
        )
    compute = on_this_machine(config, settings.num_threads, settings.ray_address)
    if ray:
        expect_answers(settings.ray_address, ON_CLUSTER)
    elif config.compute.launcher != "ray":
        _expect_shares(compute, settings.num_threads, workers)


def _expect_shares(compute: Compute, num_threads: int, workers: int) -> None:
    """Raise ConfigError where workers on this machine would have to share a GPU, or their processes a thread."""
    each = compute.num_processes
    if compute.on_gpu:
        there, kind, given = num_gpus(), "GPU", "this machine has"
    elif each > 1:
        there, kind, given = num_threads, "thread", "VISIONLOOP_NUM_THREADS gives"
    else:
        return
    if workers * each > there:
        processes = f" of {each} processes each" if each > 1 else ""
        raise ConfigError(
            f"--workers: {counted(workers, 'worker')}{processes} need {counted(workers * each, kind)}, and {given} {there}; "
            f"use fewer workers{', or lower ' + PLACE + '.processes' if each > 1 else ''}"
        )


class WorkerEnded(Exception):
    """The process that trained a trial ended without a word; the message says how."""


class Worker(Protocol):
    """Trains one trial at a time."""

    def train(self, number: int, config: RunConfig, on_epoch: OnEpoch, progress: Progress) -> TrialResult:
        """Raises WorkerEnded when it is gone, and what ends the whole search."""
        ...


@contextlib.contextmanager
def workers(place: Place, count: int, say: Say) -> Iterator[list[Worker]]:
    """So many workers; one alone is this process."""
    if count == 1:
        yield [Trainer(place)]
        return
    started = [Process(place, sees_gpus(number, place.gpus) if place.gpus else {}) for number in range(count)]
    beside = f" and {counted(place.gpus, 'GPU')} of its own" if place.gpus else ""
    say(f"    {count} processes train trials, each with {place.num_threads} of the threads{beside}")
    try:
        yield list(started)
    finally:
        for one in started:
            one.close()


class Process:
    """A process of its own, started anew when the one before has ended."""

    def __init__(self, place: Place, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        """`environment` is what is set for it beside this one's."""
        self._place, self._environment = place, environment
        self._process: Any = None
        self._said: IO[str] | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        return None if self._process is None else self._process.pid

    def train(self, number: int, config: RunConfig, on_epoch: OnEpoch, progress: Progress) -> TrialResult:
        process = self._process or self._start()
        try:
            self._tell(process, {"number": number, "config": config.to_json()})
            while True:
                heard = self._hear(process)
                if "epoch" in heard:
                    self._tell(process, {"go_on": on_epoch(heard["epoch"])})
                elif "progress" in heard:
                    progress(*heard["progress"])
                elif "error" in heard:
                    self._end()  # it ends after that
                    raise error_of(heard["error"])
                else:
                    return TrialResult.read(heard["result"])
        except (BrokenPipeError, EOFError):
            ending = self._ending(process)
            self._end()
            raise WorkerEnded(ending) from None
        except WorkerEnded:
            self._end()
            raise

    def close(self) -> None:
        """End the process, whatever it does; none is started any more."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, self._said):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def _start(self) -> Any:
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (it lives as long as the process)
        self._process = start_process(self._said, self._environment)
        if self._closed:  # while it was started
            self._end()
            raise WorkerEnded("the search has ended")
        self._tell(self._process, asdict(self._place))
        return self._process

    def _tell(self, process: Any, order: dict[str, Any]) -> None:
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()

    def _hear(self, process: Any) -> dict[str, Any]:
        line = process.stdout.readline()
        if not line.endswith("\n"):
            raise EOFError
        heard: dict[str, Any] = json.loads(line)
        return heard

    def _ending(self, process: Any) -> str:
        told = ended_by(process.wait())
        assert self._said is not None
        self._said.seek(0)
        lines = [line for line in self._said.read().splitlines() if line.strip()]
        return f"{told}: {lines[-1][:300]}" if process.returncode > 0 and lines else told


def start_process(said: IO[str] | int, environment: Mapping[str, str] = MappingProxyType({})) -> subprocess.Popen[str]:
    """A process that trains trials, with this environment beside ours; what it says aloud goes to `said`."""
    return subprocess.Popen(
        [sys.executable, "-m", "flows.tuning.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=said,
        text=True,
        env=environment_with({"PYTHONPATH": ":".join(path for path in sys.path if path), **environment}),
    )


def ended_by(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"its process ended with status {status}"
    hint = ", as the system does where memory is not enough" if -status == signal.SIGKILL else ""
    return f"its process was ended by {signal.Signals(-status).name}{hint}"
