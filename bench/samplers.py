"""TPE against random search, at equal numbers of trials, on a recorded study: every combination of a space, trained once.

The study is bench/recorded/NAME.json, what `visionloop study show --json` says of a search that tried all of its space. Both
samplers search it many times with other seeds; a trial costs nothing, for what it came to is read from the record. Nothing
is trained here, and DATA is not looked at.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.serving import say
from components.intervals import wilson
from components.search import SearchConfig
from flows.training.chosen import ChosenRecipe
from flows.tuning.space import Space, Value, space_of
from flows.tuning.study import Trial, proposal
from flows.workspace.recipes import load_recipe
from flows.workspace.workspace import Workspace

RECORD = Path(__file__).parent / "recorded" / "digits.json"
TRIALS = 20
SEEDS = 100
SHORT = {"SEEDS": 2, "TRIALS": 10}


def run(_: Path | None, scratch: Path) -> dict[str, Any]:
    """Mean of the lowest valid loss that each sampler finds, and how often TPE's is lower."""
    recorded = json.loads(RECORD.read_text())
    space, config = _space(recorded, scratch)
    known = {_key(trial["params"]): trial["valid_loss"] for trial in recorded["trials"] if trial["valid_loss"] is not None}
    found: dict[str, list[float]] = {
        name: [_best(space, config.model_copy(update={"seed": seed, "sampler": name}), known) for seed in range(SEEDS)]
        for name in ("tpe", "random")
    }
    pairs = list(zip(found["tpe"], found["random"], strict=True))
    wins, ties = sum(ours < theirs for ours, theirs in pairs), sum(ours == theirs for ours, theirs in pairs)
    won = wilson(wins, max(1, len(pairs) - ties))
    means = {name: statistics.mean(values) for name, values in found.items()}
    lowest = min(known.values())
    say(f"  lowest of all {len(known)} combinations: {lowest:.4f}; mean found: {means}")
    told = "TPE wins" if won.low > 0.5 else "random wins" if won.high < 0.5 else "no difference is shown"
    return {
        "ours": round(means["tpe"], 5),
        "peers": {"random search": round(means["random"], 5)},
        "ratio": round((means["random"] - lowest) / max(means["tpe"] - lowest, 1e-9), 2),
        "lowest_there_is": round(lowest, 5),
        "tpe_lower": {"share": round(won.value, 3), "low": round(won.low, 3), "high": round(won.high, 3), "ties": ties},
        "told": told,
        "n": len(pairs),
        "unit": f"lowest valid loss after {TRIALS} trials; the ratio is of what is above the lowest there is",
    }


def _space(recorded: Mapping[str, Any], scratch: Path) -> tuple[Space, SearchConfig]:
    """The space that was recorded, of the recipe that it was a search of."""
    section = {"space": json.loads(recorded["identity"]["space"]), "objective": "valid_loss", "pruner": "none"}
    config = load_recipe(recorded["recipe"], [f"search={json.dumps(section)}"])
    assert config.search is not None
    return space_of(ChosenRecipe(Workspace(scratch), recorded["recipe"], (), config)), config.search


def _best(space: Space, config: SearchConfig, known: Mapping[str, float]) -> float:
    """The lowest loss that a search of the record finds."""
    trials: list[Trial] = []
    for number in range(TRIALS):
        params = proposal(trials, "minimize", space, config)
        loss = known.get(_key(params))
        trials.append(Trial(number, number, params, "failed" if loss is None else "complete", loss))
    return min(trial.value for trial in trials if trial.value is not None)


def _key(params: Mapping[str, Value]) -> str:
    """A trial's values; a grid of floats is not met to the last bit."""
    return json.dumps(sorted((key, f"{value:.6g}" if isinstance(value, float) else value) for key, value in params.items()))
