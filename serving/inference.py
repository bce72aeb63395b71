"""A request to answers, whatever protocol it came by: queue, engine, decision rule, journal."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import math
import os
import re
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from components.answering import decided
from components.contracts.families import Task
from components.contracts.releases import Release
from components.images import STATISTICS
from components.journals import encode_row
from serving.engines.deployment import Deployment
from serving.engines.frames import Facts, Form, Outcome
from serving.engines.limits import NotServing, Overloaded
from serving.log.captures import Captures
from serving.log.journal import Journal
from serving.metrics import Metrics
from serving.routing import Routed

_MODEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_REMEMBERED = 4000
"""Pictures, not keys: an answer keeps its probabilities and embedding."""
_REMEMBER_S = 600.0
_NAMES = tuple(STATISTICS)


class Rejected(Exception):
    """A request that gets no answer: an HTTP status, what was wrong and what to do, and when to try again."""

    def __init__(self, status: int, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after_s = status, message, retry_after_s


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered picture."""

    prediction_id: str
    predicted: str
    """What the task reads, also when unsure; of classes the likeliest."""
    confidence: float
    unsure: bool
    """Whether the release's threshold is not reached."""
    label: str
    """The decision: `predicted`, or `unsure_label` when unsure; never a class then."""
    facts: Facts


@dataclass(frozen=True, slots=True)
class Answered:
    """All pictures of one request, answered by one release."""

    deployment: Deployment
    version: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class _Known:
    """A request with an idempotency key: what it was for, and its answer."""

    digest: str
    pictures: int
    since: float
    task: asyncio.Task[Answered]


class Inference:
    """Answers for the models of one server."""

    def __init__(self, routed: Mapping[str, Routed], journal: Journal, captures: Captures, metrics: Metrics) -> None:
        self.routed, self.metrics = routed, metrics
        self._journal, self._captures = journal, captures
        self._remembered: OrderedDict[tuple[str, str, str], _Known] = OrderedDict()
        self._remembered_pictures = 0
        self.draining = False

    def model(self, name: str | None) -> Routed:
        """The model of this name, or the only one; raises Rejected."""
        if name is None:
            if len(self.routed) == 1:
                return next(iter(self.routed.values()))
            raise Rejected(400, f"name a model: {', '.join(sorted(self.routed))}")
        if not _MODEL.fullmatch(name):
            raise Rejected(400, "that is not a model name; names have a-z, 0-9, '.', '_' and '-', at most 63")
        if name not in self.routed:
            raise Rejected(404, f"unknown model {name!r}; served here: {', '.join(sorted(self.routed))}")
        return self.routed[name]

    def deployment(self, name: str | None, version: str | None = None) -> Deployment:
        """What answers for a model now; raises Rejected when nothing does, or another version."""
        routed = self.model(name)
        try:
            current = routed.current
        except NotServing:
            raise Rejected(503, f"{routed.model} is not ready yet; try again", retry_after_s=1.0) from None
        if version and version != current.version:
            raise Rejected(404, f"version {version[:64]!r} of {routed.model} is not served; now it is {current.version}")
        return current

    @property
    def ready(self) -> bool:
        """Whether every model answers and the server is not stopping."""
        return not self.draining and all(routed.ready for routed in self.routed.values())

    async def answer(
        self,
        name: str | None,
        version: str | None,
        pictures: Sequence[tuple[Form, bytes]],
        *,
        protocol: str,
        key: str = "",
        caller: str = "",
        event_at: float | None = None,
    ) -> Answered:
        """Answer all pictures or none; raises Rejected.

        The same `key` of the same `caller` again is answered the same, without a new row in the log, for as long as it is
        remembered (ten minutes, and the last few thousand pictures).
        """
        deployment = self.deployment(name, version)
        if not key:
            return await self._answer(deployment, pictures, protocol=protocol, key="", event_at=event_at)
        if len(key) > 128 or not key.isprintable():
            raise Rejected(400, "an idempotency key has at most 128 printable characters")
        digest = hashlib.sha256(b"".join(hashlib.sha256(data).digest() for _, data in pictures)).hexdigest()
        place = (deployment.model, caller, key)
        self._forget()
        known = self._remembered.get(place)
        if known is None:
            # In a task of its own: a client that hangs up takes neither the answer nor the key with it.
            work = self._answer(deployment, pictures, protocol=protocol, key=key, event_at=event_at)
            task = asyncio.get_running_loop().create_task(work)
            known = self._remembered[place] = _Known(digest, len(pictures), time.monotonic(), task)
            self._remembered_pictures += known.pictures
        elif known.digest != digest:
            raise Rejected(422, "this idempotency key was used for another picture; use a new one")
        try:
            return await asyncio.shield(known.task)
        except Exception:
            # A refusal, or a failure of ours, is not an answer: the same key may be tried again.
            if self._remembered.get(place) is known:
                self._forget_one(place)
            raise

    def _forget(self) -> None:
        oldest = time.monotonic() - _REMEMBER_S
        while self._remembered:
            place, known = next(iter(self._remembered.items()))
            if not known.task.done() or (known.since > oldest and self._remembered_pictures <= _REMEMBERED):
                return
            if not known.task.cancelled():
                known.task.exception()
            self._forget_one(place)

    def _forget_one(self, place: tuple[str, str, str]) -> None:
        self._remembered_pictures -= self._remembered.pop(place).pictures

    async def _answer(
        self,
        deployment: Deployment,
        pictures: Sequence[tuple[Form, bytes]],
        *,
        protocol: str,
        key: str,
        event_at: float | None,
    ) -> Answered:
        started, ingest_at = time.perf_counter(), time.time()
        version = deployment.version
        if not pictures:
            raise Rejected(400, "no picture in the request")
        try:
            futures = deployment.submit(pictures)
        except Overloaded as error:
            self.metrics.shed.labels(deployment.model, protocol).inc(len(pictures))
            raise Rejected(503, "the server is full; try again later", retry_after_s=error.retry_after_s) from None
        except NotServing:
            raise Rejected(503, "no engine can answer now; try again", retry_after_s=1.0) from None
        try:
            results = [await future for future in futures]
        except NotServing:
            raise Rejected(503, "no engine came to it in time; try again", retry_after_s=1.0) from None
        finally:
            for future in futures:
                if not future.done():
                    future.cancel()
                elif not future.cancelled():
                    future.exception()  # looked at: nobody else will
        answers, rows = [], []
        for index, (result, (form, _)) in enumerate(zip(results, pictures, strict=True)):
            if not isinstance(result, Facts):
                self.metrics.pictures.labels(deployment.model, result.outcome.name.lower()).inc()
                which = f"picture {index}: " if len(pictures) > 1 else ""
                status = 400 if result.outcome is Outcome.UNDECODABLE else 503
                retry = None if status == 400 else 1.0
                raise Rejected(status, f"{which}{result.message}", retry_after_s=retry)
            answer = decide(deployment.release, deployment.task, result)
            answers.append(answer)
            facts = {
                "prediction_id": answer.prediction_id,
                "idempotency_key": key or None,
                "model": deployment.model,
                "version": version,
                "release": deployment.digest,
                "engine_digest": deployment.engine_digest,
                "role": "champion",
                "protocol": protocol,
                "form": form.name.lower(),
                "image_sha256": result.image_sha256,
                "predicted": answer.predicted,
                "event_at": event_at if event_at is not None else ingest_at,
                "ingest_at": ingest_at,
                "latency_ms": (time.perf_counter() - started) * 1e3,
                "confidence": answer.confidence,
                "unsure": answer.unsure,
                "width": result.width,
                "height": result.height,
                "bytes": result.num_bytes,
                **dict(zip(_NAMES, result.appearance, strict=True)),
            }
            rows.append(encode_row(facts, result.probabilities.tobytes(), result.embedding))
        await self._journal.write(rows)
        for result, (form, data) in zip(results, pictures, strict=True):
            if form is Form.ENCODED and isinstance(result, Facts):
                self._captures.offer(result.image_sha256, data)
        self.metrics.pictures.labels(deployment.model, "answered").inc(len(answers))
        self.metrics.seconds.labels(deployment.model).observe(time.perf_counter() - started)
        return Answered(deployment, version, tuple(answers))


def decide(release: Release, task: Task, facts: Facts) -> Answer:
    """The release's decision on one picture."""
    (found,) = decided(release, task, facts.probabilities[None])
    return Answer(new_id(), found.predicted, found.confidence, found.unsure, found.label, facts)


def new_id() -> str:
    """32 hex digits that begin with the time in milliseconds, so that ids sort as they were made."""
    return f"{int(time.time() * 1e3):012x}{os.urandom(10).hex()}"


def moment(text: str | None) -> float | None:
    """A time of a request's header as seconds since 1970; raises Rejected."""
    if text is None:
        return None
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise Rejected(400, "the event time is not ISO 8601, such as 2026-03-01T14:00:00Z") from None
    seconds = (found if found.tzinfo else found.replace(tzinfo=datetime.UTC)).timestamp()
    if not math.isfinite(seconds) or seconds < 0 or seconds > time.time() + 86400:
        raise Rejected(400, "the event time lies before 1970 or more than a day ahead")
    return seconds
