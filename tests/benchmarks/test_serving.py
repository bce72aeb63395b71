from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import serving
from bench.serving import Server, _pairs, goodput_of_ceiling, rate_near


@pytest.mark.parametrize("guess", [3.0, 30.0, 50.0, 80.0, 200.0])
def test_the_highest_rate_is_found_from_any_guess(guess: float) -> None:
    asked: list[float] = []

    def probe(rate: float, number: int) -> bool:
        assert number == len(asked)
        asked.append(rate)
        return rate <= 50

    found = rate_near(probe, guess, probes=20)
    assert 49.5 < found <= 50
    assert found == max(rate for rate in asked if rate <= 50)


def test_a_server_that_never_keeps_the_bound_has_no_rate() -> None:
    assert rate_near(lambda rate, number: False, 50.0) == 0


def test_goodput_is_a_share_of_what_the_engine_did_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that gets slower from round to round changes both sides alike."""
    speeds = iter([100.0, 80.0, 60.0])

    class Slowing:
        def rate(self) -> float:
            return next(speeds)

    answered = iter([81.0, 35.0])
    offered: list[float] = []

    def offer(*_: Any, rate: float, **__: Any) -> dict[str, Any]:
        offered.append(rate)
        return {"goodput_per_s": next(answered), "refused_ms": {"p50": 1.0}, "accepted_ms": {}}

    monkeypatch.setattr(serving, "offered", offer)
    monkeypatch.setattr(serving, "_ROUNDS", 2)
    told = goodput_of_ceiling(Server("visionloop", "defaults", []), 1, [Path("a.jpg")], Slowing())  # type: ignore[arg-type]
    assert offered == pytest.approx([130, 104])  # more than the engine can, each time
    assert [found["of_ceiling"] for found in told["rounds"]] == [0.9, 0.5]
    assert (told["n"], told["median"], told["least"], told["most"]) == (2, pytest.approx(0.7), 0.5, 0.9)


def test_ours_meets_the_two_strongest_peers_each_in_its_best_setting() -> None:
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
    assert met == [("batches of 8", "B", "1"), ("batches of 8", "A", "2")]
    assert _pairs(both, both, {("A", "1"): 20.0}) == []
    assert _pairs(both, both, {("visionloop", "defaults"): 50.0}) == []
