"""One release in service: a bounded queue, batches, and the engine's process.

Pictures wait in one queue and leave it in batches as soon as a lane is free; under load batches form by themselves. The
queue is bounded in time (by what the engine needs for a picture) and in number: what would wait longer is refused at once.
A process that dies is replaced; what it was working on is tried again, alone, so that the picture that killed it is found:
one that kills twice is blocked. Everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
from collections import OrderedDict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.contracts.errors import ConfigError, VisionloopError
from components.contracts.families import OutputField, Task
from components.contracts.records import Stored
from components.contracts.releases import Release
from components.plugins import load
from serving.engines.frames import Facts, Form, Kind, Outcome, Refusal, Splitter, decode_answer, encode_batch, frame
from serving.engines.limits import Job, Limits, Margin, NotServing, Overloaded
from serving.engines.yielding import YIELD_WAIT_S, Yielding
from serving.metrics import Metrics, log

_CODE = Path(__file__).resolve().parents[2]
_MAX_BLOCKED = 1000
_MAX_BACKOFF_S = 10.0
_SWITCH_PATIENCE = 4.0
"""Of the bound on waiting while releases change, instead of `Margin`: a change is ours, and must cost nobody an answer."""
_SETTLE_S = 5.0
"""How long a change is felt after it: the old engine finishes and ends, the new one runs in."""
RESERVED = (
    "label",
    "unsure",
    "predicted",
    "confidence",
    "embedding",
    "prediction_id",
    "model",
    "model_version",
    "release",
)
"""What every answer says, whatever the task: no output of a task has one of these names."""
_MAX_FAILURES = 5
"""Batches in a row of which nothing was answered, after which the engine's process is replaced."""


class ReleaseRefused(VisionloopError):
    """A release did not load, warm up or answer its golden vectors; what was served before goes on."""


class _Link(asyncio.Protocol):
    """The server's end of the socket pair."""

    def __init__(self, owner: Deployment, process: subprocess.Popen[bytes]) -> None:
        self.owner, self.process = owner, process
        self.transport: Any = None
        self._splitter = Splitter()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        for kind, payload in self._splitter.feed(data):
            self.owner._received(self, kind, payload)

    def connection_lost(self, _: Exception | None) -> None:
        self.owner._lost(self)


class Deployment:
    """A release that answers, from `start` to `close`."""

    def __init__(
        self,
        release: Stored[Release],
        *,
        version: str,
        generation: int,
        limits: Limits,
        metrics: Metrics,
        plugins: Path | None,
    ) -> None:
        self.release, self.version, self.generation = release.record, version, generation
        self.digest = release.record.digest()
        self.engine_digest = release.record.engine.digest()
        self._folder, self._plugins, self._limits, self._metrics = release.folder, plugins, limits, metrics
        self._waiting: deque[Job] = deque()
        self._suspects: deque[Job] = deque()
        self._flying: dict[int, tuple[float, list[Job]]] = {}
        self._link: _Link | None = None
        self._loading: asyncio.Future[None] | None = None
        self._blocked: OrderedDict[str, None] = OrderedDict()
        self._next_batch = 0
        self._picture_ms = 0.0
        """What a picture costs while every lane is at work."""
        self._up_since = -math.inf
        self._margin = Margin()
        self._patient_until = -math.inf
        self._closed = False
        self._deaths = 0
        self.task: Task
        """What reads the engine's answers, and what it puts into a response; known from `start` on."""
        self.task_outputs: tuple[OutputField, ...] = ()
        self._width = 0
        self._failures = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._delay: asyncio.TimerHandle | None = None
        model = release.record.model
        self._queued = metrics.queued.labels(model)
        self._batch_size = metrics.batch_size.labels(model)
        self._queue_seconds = metrics.queue_seconds.labels(model)
        self._profiles_ignored = metrics.profiles_ignored.labels(model)
        self._decode_seconds = metrics.decode_seconds.labels(model)
        self._infer_seconds = metrics.infer_seconds.labels(model)

    @property
    def model(self) -> str:
        return self.release.model

    @property
    def ready(self) -> bool:
        """Whether an engine answers now."""
        return self._link is not None and not self._closed

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._suspects)

    async def start(self, *, beside: Sequence[Deployment] = ()) -> None:
        """Start the engine's process and wait until it is warm and golden; raises ReleaseRefused.

        Loading leaves the processors to what is served `beside` it, as far as that needs them. Raises ConfigError or
        UnknownName for a task that is not there.
        """
        # In a thread: a task of a workspace may import what it likes, and requests are answered meanwhile.
        self.task, self.task_outputs, self._width = await asyncio.to_thread(_task_of, self.release)
        await self._spawn(beside)
        self._task(self._watch())

    async def _spawn(self, beside: Sequence[Deployment] = ()) -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "serving.engines.process",
                str(theirs.fileno()),
                str(os.getpid()),
                str(self._limits.niceness),
            ],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=_CODE,
            process_group=0,  # a Ctrl-C is for the server
        )
        theirs.close()
        loading: asyncio.Future[None] = loop.create_future()
        self._loading = loading
        _, link = await loop.create_unix_connection(lambda: _Link(self, process), sock=ours)
        order = {
            "folder": str(self._folder),
            "plugins": str(self._plugins) if self._plugins else None,
            "lanes": self._limits.lanes,
            "max_batch": self._limits.max_batch,
            "formats": self._limits.accepted.formats,
            "max_pixels": self._limits.accepted.max_pixels,
            "max_bytes": self._limits.accepted.max_bytes,
        }
        link.transport.write(frame(Kind.LOAD, json.dumps(order).encode()))
        yielding = Yielding(process, beside)
        try:
            deadline = loop.time() + self._limits.load_timeout_s
            while not loading.done():
                # What it stood still does not count: it is not the release's fault.
                left = deadline + yielding.stood_still_s - loop.time()
                if left <= 0:
                    raise ReleaseRefused(f"the engine was not ready within {self._limits.load_timeout_s:g} s")
                await asyncio.wait({loading}, timeout=left)
            loading.result()
            if self._closed:
                raise ReleaseRefused("the server is stopping")
            if link.transport.is_closing():
                # After it said that it is ready: nobody would be told a second time.
                raise ReleaseRefused("the engine's process died as soon as it was ready")
            self._link = link
            self._up_since = loop.time()
        finally:
            self._loading = None
            yielding.end()
            if self._link is not link:
                self._end(link)
        self._pump()

    def _end(self, link: _Link) -> None:
        with contextlib.suppress(ProcessLookupError):
            link.process.kill()
        if link.transport is not None:
            link.transport.abort()
        self._reap(link.process)

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        # Killed, so it ends within moments; waiting in a thread keeps no zombie and blocks nobody.
        asyncio.get_running_loop().run_in_executor(None, process.wait)

    def expected_wait_s(self) -> float:
        """What a picture that came now would wait."""
        flying = sum(len(jobs) for _, jobs in self._flying.values())
        return (len(self._waiting) + len(self._suspects) + flying) * self._picture_ms / 1e3

    @property
    def behind(self) -> bool:
        """Whether pictures wait that an idle processor could be at; an engine that is away or hangs needs none."""
        needed = max(YIELD_WAIT_S, (self._limits.lanes + 1) * self._picture_ms / 1e3)
        return self.ready and self.expected_wait_s() > needed

    def be_patient(self) -> None:
        """Releases change now, or did a moment ago: better late than refused."""
        self._patient_until = asyncio.get_running_loop().time() + _SETTLE_S

    def succeed(self, old: Deployment) -> None:
        """Take over from another release: the machine is the same, and releases change now."""
        self._margin = old._margin
        self.be_patient()

    @property
    def full(self) -> bool:
        """Whether one more picture would be refused."""
        if len(self._waiting) >= self._limits.max_queue:
            return True
        if not self._waiting and not self._suspects and len(self._flying) < self._limits.lanes:
            return False  # whatever is expected: only lanes that are all at work show what a picture costs
        # Little by little back to what is usual: else all that waits at that moment would be too much at once.
        rest = max(0.0, self._patient_until - asyncio.get_running_loop().time()) / _SETTLE_S
        usual = self._margin.share
        share = usual + (_SWITCH_PATIENCE - usual) * rest
        return self.expected_wait_s() * 1e3 > share * self._limits.max_wait_ms

    def submit(self, pictures: Sequence[tuple[Form, bytes]]) -> list[asyncio.Future[Facts | Refusal]]:
        """Queue pictures that belong to one request, all or none; raises Overloaded or NotServing.

        Each future gets Facts or a Refusal, or raises NotServing when no engine came to it in time.
        """
        if self._closed or (self._link is None and self._deaths > 3):
            raise NotServing
        alone = not self._waiting and not self._flying
        if not alone and (len(self._waiting) + len(pictures) > self._limits.max_queue or self.full):
            raise Overloaded(max(0.05, self.expected_wait_s()))
        loop = asyncio.get_running_loop()
        now = loop.time()
        # The longest wait and a restart of the engine's process: what waits longer, nobody waits for any more.
        deadline = now + _SWITCH_PATIENCE * self._limits.max_wait_ms / 1e3 + 10.0
        futures: list[asyncio.Future[Facts | Refusal]] = []
        for form, data in pictures:
            future: asyncio.Future[Facts | Refusal] = loop.create_future()
            futures.append(future)
            if self._blocked and hashlib.sha256(data).hexdigest() in self._blocked:
                self._metrics.blocked.labels(self.model).inc()
                future.set_result(Refusal(Outcome.UNDECODABLE, "this picture killed a decoder before and is blocked"))
                continue
            self._waiting.append(Job(form, data, now, deadline, future, lone=len(pictures) == 1))
        self._pump()
        return futures

    def _pump(self) -> None:
        """Send batches while lanes are free. One batch more than lanes is under way, so that no lane waits for us."""
        if self._link is None:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._suspects:
            if not self._flying:
                job = self._suspects.popleft()
                if not job.future.done():
                    self._send([job], now)
                    return
                self._pump()
            return
        window = self._limits.lanes + 1
        while self._waiting and len(self._flying) < window:
            free = window - len(self._flying)
            # Who waits for fuller batches gets them; else no lane is left idle.
            share = len(self._waiting) if self._limits.batch_delay_ms else math.ceil(len(self._waiting) / free)
            size = min(self._limits.max_batch, share)
            wait = self._waiting[0].queued_at + self._limits.batch_delay_ms / 1e3 - now
            if wait > 0 and len(self._waiting) < self._limits.max_batch:
                if self._delay is None:
                    self._delay = loop.call_later(wait, self._delayed)
                break
            jobs: list[Job] = []
            while self._waiting and len(jobs) < size:
                job = self._waiting.popleft()
                if job.future.done():
                    continue  # its client is gone
                if job.deadline < now:
                    job.future.set_exception(NotServing())
                    continue
                jobs.append(job)
            if jobs:
                self._send(jobs, now)
        self._queued.set(len(self._waiting))

    def _delayed(self) -> None:
        self._delay = None
        self._pump()

    def _send(self, jobs: list[Job], now: float) -> None:
        assert self._link is not None
        self._next_batch = (self._next_batch + 1) % (1 << 32)
        self._flying[self._next_batch] = (now, jobs)
        for job in jobs:
            self._queue_seconds.observe(now - job.queued_at)
        self._batch_size.observe(len(jobs))
        self._link.transport.write(encode_batch(self._next_batch, [(job.form, job.data) for job in jobs]))

    def _received(self, link: _Link, kind: Kind, payload: bytes) -> None:
        if kind is Kind.READY and self._loading is not None and not self._loading.done():
            self._picture_ms = max(self._picture_ms, json.loads(payload)["picture_ms"])
            self._loading.set_result(None)
        elif kind is Kind.FAILED and self._loading is not None and not self._loading.done():
            self._loading.set_exception(ReleaseRefused(json.loads(payload)["message"]))
        elif kind is Kind.ANSWER and link is self._link:
            engine = self.release.engine
            batch_id, results, decode_ms, infer_ms = decode_answer(
                payload, width=self._width, embedding_dim=engine.embedding_dim
            )
            _, jobs = self._flying.pop(batch_id)
            answered = any(isinstance(result, Facts) for result in results)
            if answered and len(self._flying) >= self._limits.lanes - 1:
                # One that has the processors to itself is faster, and one that is refused costs nothing: neither says what a
                # queue would wait.
                share = (decode_ms + infer_ms) / len(jobs) / self._limits.lanes
                self._picture_ms += 0.1 * (share - self._picture_ms)
            self._decode_seconds.inc(decode_ms / 1e3)
            self._profiles_ignored.inc(sum(isinstance(result, Facts) and result.profile_ignored for result in results))
            self._infer_seconds.inc(infer_ms / 1e3)
            if all(isinstance(result, Refusal) and result.outcome is Outcome.FAILED for result in results):
                self._failures += 1
                if self._failures >= _MAX_FAILURES:
                    self._failures = 0
                    log("engine only fails", level=logging.ERROR, model=self.model, version=self.version)
                    self._kill()
            else:
                self._failures = self._deaths = 0
            now = asyncio.get_running_loop().time()
            # What came while releases change may be late, and what waited for a new process is: the margin is not at fault.
            usual_since = max(self._patient_until, self._up_since)
            for job, result in zip(jobs, results, strict=True):
                if job.lone and job.queued_at > usual_since:
                    self._margin.learn((now - job.queued_at) * 1e3 / self._limits.max_wait_ms, self._picture_ms / 1e3)
                if not job.future.done():
                    job.future.set_result(result)
            self._pump()

    def _lost(self, link: _Link) -> None:
        """The engine's process is gone: suspect what it was working on, and start another one."""
        if self._loading is not None and not self._loading.done():
            self._loading.set_exception(ReleaseRefused("the engine's process died while it loaded the release"))
            return
        if link is not self._link:
            return
        self._link = None
        self._end(link)
        flying, self._flying = [job for _, jobs in self._flying.values() for job in jobs], {}
        if self._closed:
            return
        for job in flying:
            job.digest = job.digest or hashlib.sha256(job.data).hexdigest()
            # Only one that was alone is surely the picture that did it; the others are suspects and tried again, alone.
            job.strikes += 1
            if job.strikes > 1 and len(flying) == 1:
                self._block(job)
            else:
                self._suspects.append(job)
        self._deaths += 1
        self._metrics.worker_restarts.labels(self.model).inc()
        log("engine process died", level=logging.ERROR, model=self.model, version=self.version, in_flight=len(flying))
        self._task(self._restart())

    def _block(self, job: Job) -> None:
        self._blocked[job.digest] = None
        while len(self._blocked) > _MAX_BLOCKED:
            self._blocked.popitem(last=False)
        self._metrics.blocked.labels(self.model).inc()
        log("picture blocked", level=logging.ERROR, model=self.model, image_sha256=job.digest)
        if not job.future.done():
            job.future.set_result(Refusal(Outcome.UNDECODABLE, "this picture killed a decoder before and is blocked"))

    async def _restart(self) -> None:
        while not self._closed and self._link is None:
            await asyncio.sleep(min(_MAX_BACKOFF_S, 0.25 * 2 ** (self._deaths - 1)) if self._deaths > 1 else 0)
            try:
                await self._spawn()
                log("engine process replaced", model=self.model, version=self.version)
            except (ReleaseRefused, OSError) as error:
                self._deaths += 1
                log("engine process does not start", level=logging.ERROR, model=self.model, problem=str(error))
                if self._deaths > 3:
                    for job in (*self._waiting, *self._suspects):
                        if not job.future.done():
                            job.future.set_exception(NotServing())
                    self._waiting.clear()
                    self._suspects.clear()

    async def _watch(self) -> None:
        """Replace an engine that hangs, and give up on pictures that waited too long."""
        while not self._closed:
            await asyncio.sleep(0.5)
            now = asyncio.get_running_loop().time()
            oldest = min((sent for sent, _ in self._flying.values()), default=now)
            if self._link is not None and now - oldest > self._limits.batch_timeout_s:
                log("engine hangs", level=logging.ERROR, model=self.model, seconds=round(now - oldest, 1))
                self._kill()
            for jobs in (self._waiting, self._suspects):
                while jobs and jobs[0].deadline < now:
                    job = jobs.popleft()
                    if not job.future.done():
                        job.future.set_exception(NotServing())

    def _kill(self) -> None:
        """End the engine's process; `_lost` does the rest."""
        if self._link is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._link.process.pid, signal.SIGKILL)

    def _task(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self, timeout_s: float) -> bool:
        """Wait until everything that was taken is answered; False when the time was over first."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._waiting or self._suspects or self._flying:
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(0.01)
        return True

    async def close(self) -> None:
        """End the engine's process; what still waits gets NotServing."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        link, self._link = self._link, None
        pending = [*self._waiting, *self._suspects, *(job for _, jobs in self._flying.values() for job in jobs)]
        self._waiting.clear()
        self._suspects.clear()
        self._flying.clear()
        for job in pending:
            if not job.future.done():
                job.future.set_exception(NotServing())
        if link is not None:
            self._end(link)


def _task_of(release: Release) -> tuple[Task, tuple[OutputField, ...], int]:
    """The task that reads a release's answers, its outputs, and how many probabilities an answer has."""
    task: Task = load("tasks", release.task, dict(release.task_settings))
    classes = release.engine.classes
    outputs = task.outputs(classes)
    names = [output.name for output in outputs]
    for name in names:
        if name in RESERVED or names.count(name) > 1:
            raise ConfigError(
                f"task {release.task!r} has an output {name!r}, which is in every answer already; give it a name of its own"
            )
    return task, outputs, task.width(classes)
