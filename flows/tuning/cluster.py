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
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.contracts.errors import ClusterUnavailable, ConfigError
from components.contracts.progress import Progress
from components.contracts.wording import counted
from components.ray_address import RayAddress
from components.ray_cluster import expect_alike, expect_answers, shared_folder, versions
from components.ray_job import join
from flows.terminal import Say
from flows.training.run import code_digest
from flows.tuning.trial import OnEpoch, Place, TrialResult
from flows.tuning.workers import ON_CLUSTER, Process, Worker, WorkerEnded, ended_by, start_process
from flows.workspace.recipes import RunConfig
from flows.workspace.workspace import Workspace, lock_digest

_HEARS_S = 10.0
"""How long an actor listens before it says that there is nothing yet."""
_PLACED_S = 120.0
"""How long a worker may wait for the cluster to give it a place."""
_LOOKS_S = 1.0


@contextlib.contextmanager
def cluster(address: RayAddress, place: Place, count: int, say: Say) -> Iterator[list[Worker]]:
    """So many workers, or as many as the cluster has room for; raises ClusterUnavailable, ConfigError."""
    expect_answers(address, ON_CLUSTER)
    join(address.head)
    ray: Any = importlib.import_module("ray")
    workspace = Workspace(Path(place.root))
    try:
        room = _room(ray.nodes(), place)
        if room < 1:
            raise ConfigError(
                f"no machine of the Ray cluster at {address} has {counted(place.num_threads, 'processor')} for a worker; "
                f"set VISIONLOOP_NUM_THREADS to fewer, or add machines"
            )
        with shared_folder(workspace.cache) as shared, contextlib.ExitStack() as stack:
            places = Places(ray, place, {**shared, "versions": _versions(workspace)}, say)
            stack.callback(places.close)
            found = places.begin(min(count, room))
            nodes = sorted({one.node for one in found})
            say(f"    {len(found)} workers on {len(nodes)} of the cluster's machines ({', '.join(nodes)})")
            yield [OnCluster(place, places) for _ in found]
    finally:
        ray.shutdown()


def _room(nodes: Sequence[Mapping[str, Any]], place: Place) -> int:
    """How many workers fit onto the machines that are there, each on one of them."""
    return sum(int(node["Resources"].get("CPU", 0) // place.num_threads) for node in nodes if node["Alive"])


def _versions(workspace: Workspace) -> dict[str, str]:
    """Names the code and the libraries that a trial's result depends on."""
    return versions() | {"visionloop": code_digest(workspace.plugins), "requirements.lock": lock_digest()}


class NoPlace(ClusterUnavailable):
    """The cluster has no place for a worker now."""


@dataclass(frozen=True)
class OnePlace:
    """An actor that has its process, and the name of its machine."""

    actor: Any
    node: str


class Places:
    """What the cluster gave to the workers of a search.

    A worker whose place is lost asks for another one. While the cluster has none it waits for one that another worker leaves
    between two trials, so that a search goes on with fewer places, and no trial is left over.
    """

    def __init__(self, ray: Any, place: Place, alike: Mapping[str, Any], say: Say) -> None:
        self.ray, self._place, self._alike, self._say = ray, place, alike, say
        self._idle: queue.SimpleQueue[OnePlace] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._held = 0
        self._told = False
        self._closed = False

    def begin(self, count: int) -> list[OnePlace]:
        """So many places, or fewer where others use the cluster; raises ClusterUnavailable when there is none."""
        found: list[OnePlace] = []
        try:
            for _ in range(count):
                found.append(self._new())
        except NoPlace as error:
            if not found:
                raise
            self._say(f"    {error} The search goes on with fewer workers than {count}")
        finally:
            for one in found:
                self._idle.put(one)
        return found

    def take(self) -> OnePlace:
        """A place for one trial. Raises ClusterUnavailable when no worker has one any more, WorkerEnded after `close`."""
        with contextlib.suppress(queue.Empty):
            return self._idle.get_nowait()
        try:
            return self._new()
        except NoPlace as error:
            refused = error
        if self._held and not self._told:
            self._told = True
            self._say(f"    {refused} A trial waits for the place of another worker")
        while not self._closed:
            with contextlib.suppress(queue.Empty):
                return self._idle.get(timeout=_LOOKS_S)
            if not self._held:
                raise refused
        raise WorkerEnded("the search ends")

    def give(self, place: OnePlace) -> None:
        """It is idle again."""
        self._idle.put(place)

    def lose(self, place: OnePlace) -> None:
        """It is of no use any more."""
        with self._lock:
            self._held -= 1
        self.ray.kill(place.actor)

    def close(self) -> None:
        """Give all that is idle back to the cluster; nobody waits any more."""
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                self.lose(self._idle.get_nowait())

    def _new(self) -> OnePlace:
        ray, until = self.ray, time.monotonic() + _PLACED_S
        actor = ray.remote(num_cpus=self._place.num_threads, max_restarts=0)(Remote).remote()
        looked = actor.look.remote(self._place.root, self._alike)
        while not ray.wait([looked], timeout=_LOOKS_S)[0]:
            if self._closed or time.monotonic() > until:
                ray.kill(actor)
                raise NoPlace(
                    f"the Ray cluster gave a worker no place within {_PLACED_S:g} s; is it full, or are its machines gone?"
                )
        try:
            node, problem = ray.get(looked)
            if problem:
                ray.kill(actor)
                raise ClusterUnavailable(problem)
            ray.get(actor.start.remote())
            ray.get(actor.tell.remote(asdict(self._place)))
        except ray.exceptions.RayError as error:
            ray.kill(actor)
            raise NoPlace(f"a worker could not begin on the Ray cluster: {_first(error)}.") from error
        with self._lock:
            self._held += 1
        return OnePlace(actor, node)


class OnCluster(Process):
    """A worker on some machine of a cluster, which may be another one for each trial."""

    def __init__(self, place: Place, places: Places) -> None:
        super().__init__(place)
        self._places, self._ray = places, places.ray
        self._own: OnePlace | None = None

    def train(self, number: int, config: RunConfig, on_epoch: OnEpoch, progress: Progress) -> TrialResult:
        result = super().train(number, config, on_epoch, progress)
        own, self._own, self._process = self._own, None, None
        if own is not None:
            self._places.give(own)
        return result

    def close(self) -> None:
        """Give the place on the cluster back; the search ends."""
        self._places.close()
        self._end()

    def _end(self) -> None:
        own, self._own, self._process = self._own, None, None
        if own is not None:
            self._places.lose(own)

    def _start(self) -> Any:
        """The actor in place of a process."""
        self._own = self._places.take()
        self._process = self._own.actor
        return self._own.actor

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
        node = self._own.node if self._own is not None else "which was given back"
        try:
            return self._ray.get(asked)
        except self._ray.exceptions.RayError as error:
            raise WorkerEnded(f"its place on the cluster, {node}, is gone ({_first(error)})") from None


class Remote:
    """What stands on a machine of the cluster: says what is there, and hands lines to a process and back."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._heard: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def look(self, root: str, alike: Mapping[str, Any]) -> tuple[str, str]:
        """The name of this machine, and why it cannot train for the search; empty where it can."""
        node = socket.gethostname()
        try:
            expect_alike(alike, node, _versions(Workspace(Path(root))))
        except ClusterUnavailable as error:
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
