from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from bench import serving
from bench.serving import Search, Server, _pairs, goodput_of_ceiling


def _searched(guess: float, highest: float, probes: int, stalls: Collection[int] = ()) -> Search:
    search = Search(guess)
    for number in range(probes):
        search.learn(within=search.rate <= highest and number not in stalls)
    return search


@pytest.mark.parametrize("guess", [3.0, 30.0, 50.0, 80.0, 200.0])
def test_the_highest_rate_is_found_from_any_guess(guess: float) -> None:
    assert 49.5 < _searched(guess, 50, 40).highest <= 50


@pytest.mark.parametrize("guess", [40.0, 45.0, 50.0, 55.0])
def test_a_turn_comes_near_it_from_the_rate_before(guess: float) -> None:
    assert 45 <= _searched(guess, 50, serving._PROBES).highest <= 50


def test_one_stall_does_not_bound_what_follows() -> None:
    assert _searched(40, 50, 12, stalls=[0]).highest == pytest.approx(50, rel=0.05)
    assert _searched(40, 50, 12, stalls=[0, 1]).highest < 40


def test_a_server_that_never_keeps_the_bound_has_no_rate() -> None:
    assert _searched(50, 0, serving._PROBES).highest == 0


def test_goodput_is_a_share_of_what_the_engine_did_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gets slower from round to round changes both sides alike."""
    speeds = iter([7.0, 100.0, 80.0, 60.0])  # the first, of an engine that is not warm, is nobody's

    class Slowing:
        def rate(self) -> float:
            return next(speeds)

    answered = iter([(81.0, {"p50": 1.0}), (35.0, {})])
    offered: list[float] = []

    def offer(*_: Any, rate: float, **__: Any) -> dict[str, Any]:
        offered.append(rate)
        goodput, refused = next(answered)
        return {"goodput_per_s": goodput, "refused_ms": refused, "accepted_ms": {}}

    monkeypatch.setattr(serving, "offered", offer)
    monkeypatch.setattr(serving, "_ROUNDS", 2)
    settled: list[Any] = []
    monkeypatch.setattr(serving, "settle", settled.append)
    server: Any = Server("visionloop", "defaults", [])
    engine: Any = Slowing()
    process: Any = object()
    told = goodput_of_ceiling(server, 1, [Path("a.jpg")], engine, process)
    assert settled == [process, process]
    assert not told["all_saturated"]
    assert offered == pytest.approx([130, 104])  # more than the engine can, each time
    assert [found["of_ceiling"] for found in told["rounds"]] == [0.9, 0.5]
    assert (told["n"], told["median"], told["least"], told["most"]) == (2, pytest.approx(0.7), 0.5, 0.9)


def test_ours_meets_the_two_strongest_peers_and_what_is_written_by_hand_each_in_its_best_setting() -> None:
    ours = [Server("visionloop", "defaults", [], ours=True), Server("visionloop", "batches of 8", [], ours=True)]
    peers = [
        Server(name, setting, [])
        for name, setting in (("A", "1"), ("A", "2"), ("B", "1"), ("C", "1"), ("FastAPI + the engine", "1"), ("D", "1"))
    ]
    rates = {
        ("visionloop", "defaults"): 50.0,
        ("visionloop", "batches of 8"): 60.0,
        ("A", "1"): 20.0,
        ("A", "2"): 30.0,
        ("B", "1"): 40.0,
        ("C", "1"): 25.0,
        ("FastAPI + the engine", "1"): 55.0,
        ("D", "1"): 0.0,
    }
    both = [*ours, *peers]
    met = [(mine.setting, theirs.name, theirs.setting) for mine, theirs in _pairs(both, both, rates)]
    assert met == [
        ("batches of 8", "B", "1"),
        ("batches of 8", "A", "2"),
        ("batches of 8", "FastAPI + the engine", "1"),
    ]
    assert _pairs(both, both, {("A", "1"): 20.0}) == []
    assert _pairs(both, both, {("visionloop", "defaults"): 50.0}) == []
