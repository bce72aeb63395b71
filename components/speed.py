"""How fast an engine answers on this machine: one picture after the other, many at once, and as many as there are.

Each figure is taken twice: for the engine alone, from prepared pixels, and from a picture's encoded bytes to its answer. The
two take turns, round by round, so that a moment in which the machine is busy meets both. The process is kept on as many
processors as the engine has threads. Every figure has its 95 % bootstrap interval, over rounds and their runs.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from components import plugins
from components.contracts.families import Predictor
from components.contracts.models import Engine
from components.contracts.progress import Progress, silent
from components.contracts.records import Stored
from components.contracts.verdicts import Estimate
from components.formats import format_of
from components.images import decode, prepare
from components.intervals import RESAMPLES, SEED, bootstrap, rounds_percentile
from components.machine import fingerprint

ROUNDS = 5
PERCENTILES = (50, 90, 99)
BATCH = 32
_TimedT = TypeVar("_TimedT")
_Run = Callable[[int], object]
"""Answers one picture, or one batch of them, by its number."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of single answers."""

    percentiles: tuple[Estimate, ...]
    """Of `PERCENTILES`, in this order."""


@dataclass(frozen=True)
class Speed:
    """What was measured, and where."""

    single_stream: dict[str, Latency]
    """One picture after the other, by `engine` (alone) and `picture` (from its bytes)."""
    offline: dict[str, Estimate]
    """Pictures a second in batches, by the same."""
    multi_stream: dict[str, Latency]
    """One picture after the other in as many threads as `streams`, which share the engine's threads."""
    multi_stream_rate: dict[str, Estimate]
    """Pictures a second of all these threads together."""
    num_threads: int
    streams: int
    processors: tuple[int, ...]
    """Those that the process was kept on; empty where the system knows no such thing."""
    load: float
    """Processes that ran or waited to run in the minute before, on all processors."""
    machine: str
    formats: dict[str, int]
    """How many of the pictures are of which format."""
    picture_bytes: float
    """Mean size of the pictures' files."""


def measure(
    engine: Stored[Engine],
    pictures: Sequence[bytes],
    *,
    num_threads: int,
    streams: int,
    runs: int,
    warm_up: int,
    progress: Progress = silent,
) -> Speed:
    """Time `runs` answers a figure and round, after `warm_up` untimed ones.

    Raises EngineUnavailable where the engine cannot run here, and UndecodableImage.
    """
    record = engine.record
    load = os.getloadavg()[0]
    with _kept_on(num_threads) as processors:
        target = plugins.load("targets", record.target, record.settings)
        one: Predictor = target.load(engine, num_threads=num_threads)
        many: Predictor = target.load(engine, num_threads=num_threads, num_streams=streams)

        def prepared(index: int) -> npt.NDArray[np.uint8]:
            return prepare(decode(pictures[index % len(pictures)]), record.preprocessing)

        inputs = np.stack([prepared(index) for index in range(len(pictures))])
        batch = np.stack([inputs[index % len(inputs)] for index in range(BATCH)])
        with ThreadPoolExecutor(num_threads) as decoders, ThreadPoolExecutor(streams) as callers:

            def single(predictor: Predictor) -> dict[str, _Run]:
                return {
                    "engine": lambda index: predictor.predict(inputs[index % len(inputs)][None]),
                    "picture": lambda index: predictor.predict(prepared(index)[None]),
                }

            batched: dict[str, _Run] = {
                "engine": lambda _: one.predict(batch),
                "picture": lambda index: one.predict(np.stack(list(decoders.map(prepared, range(index, index + BATCH))))),
            }
            ended = itertools.count(1)

            def round_ended() -> None:
                progress(next(ended), 3 * ROUNDS)

            alone = _rounds(single(one), lambda run: _seconds(run, runs), warm_up, round_ended)
            batches, warm_up_batches = -(-runs // BATCH), -(-warm_up // BATCH)
            offline = _rounds(
                batched, lambda run: BATCH * batches / _seconds(run, batches).sum(), warm_up_batches, round_ended
            )

            def together(run: _Run) -> tuple[npt.NDArray[np.float64], float]:
                start = time.perf_counter()
                found = list(callers.map(lambda _: _seconds(run, runs), range(streams)))
                return np.concatenate(found), streams * runs / (time.perf_counter() - start)

            shared = _rounds(single(many), together, warm_up, round_ended)
    return Speed(
        single_stream={name: _latency(rounds) for name, rounds in alone.items()},
        offline={name: rate_of(rounds) for name, rounds in offline.items()},
        multi_stream={name: _latency([seconds for seconds, _ in rounds]) for name, rounds in shared.items()},
        multi_stream_rate={name: rate_of([rate for _, rate in rounds]) for name, rounds in shared.items()},
        num_threads=num_threads,
        streams=streams,
        processors=processors,
        load=load,
        machine=fingerprint(),
        formats=dict(Counter(format_of(data) for data in pictures)),
        picture_bytes=float(np.mean([len(data) for data in pictures])),
    )


def batch_rates(
    engines: Sequence[Stored[Engine]],
    inputs: Sequence[npt.NDArray[np.uint8]],
    *,
    num_threads: int,
    runs: int,
    progress: Progress = silent,
) -> list[tuple[float, ...]]:
    """Pictures a second of each engine in batches of `BATCH`, alone, by round; the engines take turns, a round each.

    `inputs` are a few prepared pictures for each engine, and a round times at least `runs` of them. Raises
    EngineUnavailable.
    """
    with _kept_on(num_threads):
        asked: dict[str, _Run] = {}
        for place, (engine, images) in enumerate(zip(engines, inputs, strict=True)):
            target = plugins.load("targets", engine.record.target, engine.record.settings)
            predictor: Predictor = target.load(engine, num_threads=num_threads)
            batch = np.stack([images[index % len(images)] for index in range(BATCH)])
            asked[str(place)] = functools.partial(_answered, predictor, batch)
        ended, batches = itertools.count(1), -(-runs // BATCH)

        def rate(run: _Run) -> float:
            return float(BATCH * batches / _seconds(run, batches).sum())

        found = _rounds(asked, rate, 1, lambda: progress(next(ended), ROUNDS))
    return [tuple(found[str(place)]) for place in range(len(engines))]


def _answered(predictor: Predictor, batch: npt.NDArray[np.uint8], _: int) -> object:
    return predictor.predict(batch)


@contextlib.contextmanager
def _kept_on(number: int) -> Iterator[tuple[int, ...]]:
    """Keep this thread, and all that it starts meanwhile, on the first processors that it may use."""
    if not hasattr(os, "sched_setaffinity"):
        yield ()
        return
    allowed = os.sched_getaffinity(0)
    chosen = tuple(sorted(allowed)[:number])
    os.sched_setaffinity(0, chosen)
    try:
        yield chosen
    finally:
        os.sched_setaffinity(0, allowed)


def _rounds(
    runs: dict[str, _Run], timed: Callable[[_Run], _TimedT], warm_up: int, ended: Callable[[], None]
) -> dict[str, list[_TimedT]]:
    found: dict[str, list[_TimedT]] = {name: [] for name in runs}
    for run in runs.values():
        for index in range(warm_up):
            run(index)
    for _ in range(ROUNDS):
        for name, run in runs.items():
            found[name].append(timed(run))
        ended()
    return found


def _seconds(run: _Run, number: int) -> npt.NDArray[np.float64]:
    elapsed = np.empty(number)
    for index in range(number):
        start = time.perf_counter()
        run(index)
        elapsed[index] = time.perf_counter() - start
    return elapsed


def _latency(rounds: Sequence[npt.NDArray[np.float64]]) -> Latency:
    return Latency(tuple(rounds_percentile([seconds * 1e3 for seconds in rounds], each) for each in PERCENTILES))


def rate_of(rounds: Sequence[float]) -> Estimate:
    """The median of the rounds."""
    values = np.array(rounds)
    picks = np.random.default_rng(SEED).integers(0, len(values), size=(RESAMPLES, len(values)))
    return bootstrap(float(np.median(values)), np.median(values[picks], axis=1), len(values))
