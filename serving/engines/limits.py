"""Bounds of a deployment: how many pictures wait, how long, and what a refusal says. `Deployment.full` decides by them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from components.formats import Accepted
from serving.engines.frames import Form


@dataclass(frozen=True)
class Limits:
    """Bounds of one deployment."""

    lanes: int = 2
    """Batches decoded and inferred at once; one thread each."""
    max_batch: int = 4
    """On two CPU cores more costs latency and memory and buys nothing (infra/decisions/0009)."""
    batch_delay_ms: float = 0.0
    """How long a picture may wait for others while a lane is free; on CPUs waiting buys nothing."""
    max_queue: int = 256
    """Most pictures that wait."""
    max_wait_ms: float = 500.0
    """What 99 % of the accepted pictures should wait at most; one is taken while a lane is free or the expected wait is
    within the share of this that `Margin` holds, while releases change within `_SWITCH_PATIENCE` of it, as far as
    `max_queue` allows."""
    accepted: Accepted = field(default_factory=Accepted)
    load_timeout_s: float = 120.0
    batch_timeout_s: float = 30.0
    """An engine that needs longer for a batch is taken for hung and replaced."""
    niceness: int = 5
    """Of the engine's process, over the server's: who is answered or refused takes the processors for a fraction of a
    millisecond, and would else wait for whole time slices of the lanes (infra/decisions/0009)."""


class Overloaded(Exception):
    """The queue is full; `retry_after_s` says when it is worth trying again."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("the server is full")
        self.retry_after_s = retry_after_s


class NotServing(Exception):
    """There is no engine that could answer now."""


class Job:
    __slots__ = ("data", "deadline", "digest", "form", "future", "lone", "queued_at", "strikes")

    def __init__(
        self, form: Form, data: bytes, now: float, deadline: float, future: asyncio.Future[Any], *, lone: bool = True
    ) -> None:
        self.form, self.data, self.queued_at, self.deadline, self.future = form, data, now, deadline, future
        self.lone = lone
        """The only picture of its request; others wait for their own neighbours too."""
        self.strikes = 0
        self.digest = ""


class Margin:
    """Share of the bound on waiting up to which pictures are taken; the rest is for what the expectation misses.

    How much it misses is the machine's: steady processors keep what is expected of them, shared ones stall. So the share is
    the largest that keeps `_IN_TIME` of what had to wait inside the bound, between `_LEAST` and `_MOST`, found as a quantile
    is by stochastic approximation (Robbins and Monro, 1951): down with what is late, up with what is in time, in balance at
    that ratio. Steps are in proportion to the work, so that a second's stall counts the same at ten pictures a second and at
    a thousand.
    """

    _IN_TIME = 0.995
    _LATE = 0.9
    """Of the bound; the rest is the way to the client, which shares the processors with everything else."""
    _LEAST, _MOST = 0.4, 0.8
    _PER_WORK_S = 0.5

    def __init__(self) -> None:
        self.share = 0.6

    def learn(self, waited: float, work_s: float) -> None:
        """Of a picture that was answered: what it waited, as a share of the bound, and what it cost the engine."""
        if waited > self._LATE:
            step = -self._IN_TIME
        elif waited > self.share / 2:
            step = 1 - self._IN_TIME
        else:
            return  # in time, but nothing was in its way
        self.share = min(self._MOST, max(self._LEAST, self.share + self._PER_WORK_S * work_s * step))
