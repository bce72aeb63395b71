"""Both ways of asking an engine take turns, and every figure tells how sure it is."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from served import png

from components import plugins, speed
from components.contracts.models import Engine, Preprocessing
from components.contracts.records import Stored


class Recorder:
    """A target and its predictor, which write down who asked for how many pictures on which processors."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, str]] = []
        self.processors: set[tuple[int, ...]] = set()

    def load(self, _: Any, *, num_threads: int, num_streams: int = 1) -> Recorder:
        assert (num_threads, num_streams) in ((1, 1), (1, 3))
        return self

    def predict(self, images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        self.asked.append((len(images), int(images.max()), threading.current_thread().name))
        self.processors.add(tuple(sorted(os.sched_getaffinity(0))))
        return np.zeros((len(images), 3), dtype=np.float32), np.zeros((len(images), 4), dtype=np.float32)


def test_the_two_figures_take_turns_on_the_processors_that_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, decoded = Recorder(), list[int]()

    def load(*_: Any) -> Recorder:
        return recorder

    def prepare(picture: Any, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
        decoded.append(len(recorder.asked))
        return np.full((16, 16, 1), 7, dtype=np.uint8)

    monkeypatch.setattr(plugins, "load", load)
    monkeypatch.setattr(speed, "prepare", prepare)
    engine = Engine(
        name="fake-fp32",
        target="fake",
        precision="fp32",
        settings={},
        checkpoint_digest="",
        files=(),
        entry="",
        preprocessing=Preprocessing(
            channels=1, height=16, width=16, resize_shortest=16, interpolation="bilinear", mean=(0.5,), std=(0.5,)
        ),
        classes=("cross", "disc", "stripes"),
        embedding_dim=4,
        temperature=1.0,
        runtime="fake 1",
        built_for=(),
        facts={},
    )
    before = os.sched_getaffinity(0)
    told: list[tuple[int, int]] = []
    found = speed.measure(
        Stored(engine, None),  # type: ignore[arg-type]
        [png("disc", 1), png("cross", 2)],
        num_threads=1,
        streams=3,
        runs=20,
        warm_up=2,
        progress=lambda done, total, note="": told.append((done, total)),
    )
    assert told == [(done, 15) for done in range(1, 16)]
    assert os.sched_getaffinity(0) == before
    assert recorder.processors == {found.processors}
    assert found.processors == (min(before),)
    # Single stream: two warm-up answers each, then rounds of twenty, the engine alone first.
    single = recorder.asked[: 4 + 5 * 40]
    assert {size for size, *_ in single} == {1}
    decoding = [place for place in decoded if place < len(single)][2:]  # two for the prepared pixels
    expected = [2, 3] + [4 + 40 * turn + 20 + run for turn in range(5) for run in range(20)]
    assert decoding == expected
    sizes = [size for size, *_ in recorder.asked]
    assert sizes.count(32) == 2 * (1 + 5)
    callers = {name for size, _, name in recorder.asked[len(single) + sizes.count(32) :] if size == 1} - {"MainThread"}
    assert 1 <= len(callers) <= 3
    assert [e.n for e in found.single_stream["engine"].percentiles] == [100] * 3
    assert [e.n for e in found.multi_stream["picture"].percentiles] == [300] * 3
    for latency in (*found.single_stream.values(), *found.multi_stream.values()):
        p50, p90, p99 = latency.percentiles
        assert p50.value <= p90.value <= p99.value
        assert all(e.low <= e.value <= e.high for e in latency.percentiles)
    assert found.offline.keys() == found.multi_stream_rate.keys() == {"engine", "picture"}
    assert (found.formats, found.picture_bytes > 100) == ({"PNG": 2}, True)


def test_engines_that_are_compared_take_turns_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Recorder(), Recorder()
    second.asked = first.asked  # one list, in the order of time
    found = iter((first, second))

    def load(*_: Any) -> Recorder:
        return next(found)

    monkeypatch.setattr(plugins, "load", load)
    engines: Any = [SimpleNamespace(record=SimpleNamespace(target="fake", settings={}))] * 2
    inputs = [np.full((3, 4, 4, 1), number, dtype=np.uint8) for number in (1, 2)]
    rates = speed.batch_rates(engines, inputs, num_threads=1, runs=33)
    assert [len(rounds) for rounds in rates] == [speed.ROUNDS] * 2
    assert min(min(rounds) for rounds in rates) > 0
    # A batch each to warm up, then two batches a round of one engine after the other.
    assert [(size, engine) for size, engine, _ in first.asked] == [(32, 1), (32, 2)] + [
        (32, 1),
        (32, 1),
        (32, 2),
        (32, 2),
    ] * 5
