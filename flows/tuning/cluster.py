"""Workers on the machines of a Ray cluster that exists: on each an actor that starts the process of flows/tuning/worker.py.

The cluster shares a file system with this machine, with the workspace in the same place, and the same code and locked
libraries are installed on it; an actor is asked about all of that before it trains anything.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import queue
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components.contracts.errors import ClusterUnavailable, ConfigError
from components.ray_cluster import expect_alike, expect_answers, shared_folder
from components.ray_job import join
from flows.terminal import Say
from flows.training.run import code_digest
from flows.tuning.trial import Place
from flows.tuning.workers import ON_CLUSTER, Process, Worker, WorkerEnded, ended_by, start_process
from flows.workspace.workspace import Workspace, lock_digest

_HEARS_S = 10.0
"""How long an actor listens before it says that there is nothing yet."""
_PLACED_S = 120.0
"""How long a worker may wait for the cluster to give it a place."""


@contextlib.contextmanager
def cluster(address: str, place: Place, count: int, say: Say) -> Iterator[list[Worker]]:
    """So many workers, or as many as the cluster has processors for; raises ClusterUnavailable, ConfigError."""
    expect_answers(address, ON_CLUSTER)
    join(address)
    ray: Any = importlib.import_module("ray")
    started: list[OnCluster] = []
    workspace = Workspace(Path(place.root))
    try:
        room = int(ray.cluster_resources().get("CPU", 0)) // place.num_threads
        if room < 1:
            raise ConfigError(
                f"the Ray cluster at {address} has no {place.num_threads} processors for a worker; set "
                f"VISIONLOOP_NUM_THREADS to fewer"
            )
        with shared_folder(workspace.cache) as shared:
            alike = {**shared, "source": _source(workspace)}
            for _ in range(min(count, room)):
                started.append(OnCluster(ray, place, alike))
            nodes = sorted({one.node for one in started})
            say(f"    {len(started)} workers on {len(nodes)} of the cluster's machines ({', '.join(nodes)})")
            yield list(started)
    finally:
        for one in started:
            one.close()
        ray.shutdown()


def _source(workspace: Workspace) -> str:
    """Names the code and the libraries that a trial's result depends on."""
    return f"{code_digest(workspace.plugins)} {lock_digest()}"


class OnCluster(Process):
    """A worker on some machine of a cluster; another one when it is gone."""

    def __init__(self, ray: Any, place: Place, alike: Mapping[str, str]) -> None:
        super().__init__(place)
        self._ray, self._alike = ray, alike
        self._actor: Any = None
        self._process: Any = None
        self.node = ""
        self._start_on_cluster()

    def _start_on_cluster(self) -> None:
        ray = self._ray
        actor = ray.remote(num_cpus=self._place.num_threads, max_restarts=0)(Remote).remote()
        try:
            node, problem = ray.get(actor.look.remote(self._place.root, self._alike), timeout=_PLACED_S)
        except ray.exceptions.GetTimeoutError:
            raise ClusterUnavailable(
                f"the Ray cluster gave a worker no place within {_PLACED_S:g} s; is it full, or are its machines gone?"
            ) from None
        except ray.exceptions.RayError as error:
            raise ClusterUnavailable(f"a worker could not begin on the Ray cluster: {_first(error)}") from error
        if problem:
            raise ConfigError(problem)
        ray.get(actor.start.remote())
        ray.get(actor.tell.remote(asdict(self._place)))
        self._actor, self.node = actor, node

    def close(self) -> None:
        """Give the place on the cluster back."""
        actor, self._actor, self._process = self._actor, None, None
        if actor is not None:
            self._ray.kill(actor)

    def _start(self) -> Any:
        """The actor in place of a process: the one that was looked at, or another one."""
        if self._actor is None:
            self._start_on_cluster()
        self._process = self._actor
        return self._actor

    def _tell(self, process: Any, order: dict[str, Any]) -> None:
        self._answered(process.tell.remote(order))

    def _hear(self, process: Any) -> dict[str, Any]:
        while True:
            heard: dict[str, Any] | None = self._answered(process.hear.remote(_HEARS_S))
            if heard is not None and "ended" in heard:
                raise WorkerEnded(heard["ended"])
            if heard is not None:
                return heard

    def _answered(self, asked: Any) -> Any:
        try:
            return self._ray.get(asked)
        except self._ray.exceptions.RayError as error:
            raise WorkerEnded(f"its place on the cluster, {self.node}, is gone ({_first(error)})") from None


class Remote:
    """What stands on a machine of the cluster: says what is there, and hands lines to a process and back."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._heard: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def look(self, root: str, alike: Mapping[str, str]) -> tuple[str, str]:
        """The name of this machine, and why it cannot train for the search; empty where it can."""
        node = socket.gethostname()
        try:
            expect_alike(alike, node, _source(Workspace(Path(root))))
        except ConfigError as error:
            return node, str(error)
        return node, ""

    def start(self) -> None:
        """Start the process that trains."""
        self._process = start_process(subprocess.DEVNULL)
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()

    def tell(self, order: dict[str, Any]) -> None:
        """A line to the process."""
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is told by `hear`
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def hear(self, timeout_s: float) -> dict[str, Any] | None:
        """What the process said next; None when that takes longer."""
        try:
            return self._heard.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith("\n"):
                self._heard.put(json.loads(line))
        self._heard.put({"ended": ended_by(process.wait())})


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
