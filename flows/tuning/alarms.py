"""Alarms of a search: trials that are the same to the bit although their values differ, so that these had no effect.

A search whose values reach no training looks like any other but for that: its trials differ in name alone. Trials that were
stopped raise none: a value such as the factor of a later step had no time to take effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from components.contracts.wording import counted
from flows.tuning.space import Parameter, shown
from flows.tuning.study import Trial


@dataclass(frozen=True)
class Alarm:
    """Something that makes a search worth less than it seems."""

    key: str
    """The same for what is told again with more trials."""
    text: str


def alarms(trials: Sequence[Trial], parameters: Sequence[Parameter]) -> list[Alarm]:
    """What the trials that ended show."""
    complete = [trial for trial in trials if trial.state == "complete"]
    same = [(one, other) for one, other in combinations(complete, 2) if one.params != other.params and _same(one, other)]
    if not same:
        return []
    distinct = len({_spelled(trial) for trial in complete})
    stopped = any(trial.state == "pruned" for trial in trials)
    if len(same) == distinct * (distinct - 1) // 2 and distinct > 2 and not stopped:
        return [
            Alarm(
                "all",
                f"all {counted(distinct, 'trial')} of different values were trained to the same bits: nothing that is "
                f"searched has an effect; look whether its keys are those that the training uses",
            )
        ]
    found: list[Alarm] = []
    alone: set[str] = set()
    for one, other in same:
        differing = [parameter for parameter in parameters if one.params[parameter.key] != other.params[parameter.key]]
        if len(differing) == 1 and differing[0].key not in alone:
            (parameter,) = differing
            alone.add(parameter.key)
            values = " and ".join(shown(trial.params[parameter.key]) for trial in (one, other))
            found.append(
                Alarm(
                    parameter.key,
                    f"{parameter.key} has no effect: trials {one.number} and {other.number} differ in it alone ({values}) "
                    f"and were trained to the same bits; leave it out of the space",
                )
            )
    for one, other in same:
        keys = [parameter.key for parameter in parameters if one.params[parameter.key] != other.params[parameter.key]]
        if not set(keys) <= alone:
            found.append(
                Alarm(
                    " ".join(keys),
                    f"trials {one.number} and {other.number} differ in {', '.join(keys)} and were trained to the same "
                    f"bits: none of these had an effect there",
                )
            )
    return list({alarm.key: alarm for alarm in reversed(found)}.values())[::-1]


def _spelled(trial: Trial) -> str:
    return repr(sorted(trial.params.items()))


def _same(one: Trial, other: Trial) -> bool:
    """Whether two trials were trained to the same bits."""
    return bool(one.facts.get("weights")) and one.facts["weights"] == other.facts.get("weights")
