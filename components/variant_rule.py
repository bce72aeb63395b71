"""The rule by which one of several variants is taken: limits first, then how accurate, then what was asked for. Pure.

As where an engine is chosen that is served, those whose rounds of measurement overlap count as equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from components.contracts.wording import counted
from components.variants import ChoiceConfig, Variant


def most_accurate(variants: Sequence[Variant]) -> Variant | None:
    """Of those that meet every limit, or of all that were measured where none does; of equals the fastest."""
    measured = [one for one in variants if one.status == "measured"]
    able = [one for one in measured if not one.missed] or measured
    return min(able, key=lambda one: (-one.share, one.latency_ms, one.name), default=None)


def in_rule(config: ChoiceConfig) -> str:
    """The rule in words."""
    if config.objective == "most_accurate":
        return "of the variants that meet every limit, the most accurate one; of equals the fastest"
    overlap = "" if config.objective == "smallest" else ", and where rounds of the measurement overlap the smallest of those"
    return (
        f"of the variants that meet every limit, those within {_points(config.within)} of the most accurate one; of these "
        f"the {config.objective}{overlap}"
    )


@dataclass(frozen=True)
class Picked:
    """What the rule takes."""

    chosen: str
    nearest: str
    told: Mapping[str, str]
    """What it says of each variant."""


def pick(variants: Sequence[Variant], config: ChoiceConfig) -> Picked:
    """Take one of the variants by the rule; a pure function of their figures."""
    best = most_accurate(variants)
    told = {one.name: one.reason for one in variants if one.status != "measured"}
    measured = [one for one in variants if one.status == "measured"]
    told |= {one.name: "; ".join(one.missed) for one in measured if one.missed}
    able = [one for one in measured if not one.missed]
    if best is None or not able:
        nearest = min(measured, key=lambda one: (len(one.missed), -one.share, one.name), default=None)
        return Picked("", nearest.name if nearest else "", told)
    if config.objective == "most_accurate":
        winner, tied, near = best, [best], able
    else:
        near = [one for one in able if best.share - one.share <= config.within + 1e-12]
        tied = _TIED[config.objective](near)
        winner = min(tied, key=lambda one: (one.size_bytes, one.latency_ms, one.name))
    for one in able:
        if one not in near:
            told[one.name] = f"{_below(one, best)} the most accurate, {best.name}; at most {_points(config.within)}"
        elif one is not winner:
            told[one.name] = f"meets every limit; {winner.name} is {_better(winner, one, tied, config.objective)}"
    what = config.objective.replace("_", " ")
    beside = f" of {len(near)} that meet every limit" if len(near) > 1 else ", the only one that meets every limit"
    if config.objective != "most_accurate" and len(able) > 1:
        beside = f" of {counted(len(near), 'variant')} within {_points(config.within)} of the most accurate, {best.name}"
    told[winner.name] = f"chosen: the {what}{beside}"
    if len(tied) > 1 and config.objective != "smallest":
        told[winner.name] = f"chosen: the smallest of {len(tied)} whose rounds overlap, which are the {what}{beside}"
    told[winner.name] += _unproven(winner, best, config)
    return Picked(winner.name, "", told)


def _unproven(winner: Variant, best: Variant, config: ChoiceConfig) -> str:
    """The rule goes by values: where the paired interval goes beyond what is asked, it says so."""
    found = winner.difference
    if config.objective == "most_accurate" or winner is best or found is None or -found.low <= config.within:
        return ""
    return f"; {found.n} valid images cannot prove that: it may be {-found.low * 100:.2f} points below"


def _tied_in_speed(near: Sequence[Variant]) -> list[Variant]:
    # By the rounds' extremes: a second measurement would else take another one without a cause.
    bound = min(max(one.rounds_p50_ms) for one in near)
    return [one for one in near if min(one.rounds_p50_ms) <= bound]


def _tied_in_rate(near: Sequence[Variant]) -> list[Variant]:
    bound = max(min(one.rounds_images_a_second) for one in near)
    return [one for one in near if max(one.rounds_images_a_second) >= bound]


def _tied_in_size(near: Sequence[Variant]) -> list[Variant]:
    return [one for one in near if one.size_bytes == min(other.size_bytes for other in near)]


_TIED: Mapping[str, Callable[[Sequence[Variant]], list[Variant]]] = {
    "fastest": _tied_in_speed,
    "cheapest": _tied_in_rate,
    "smallest": _tied_in_size,
}


def _better(winner: Variant, other: Variant, tied: Sequence[Variant], objective: str) -> str:
    speeds = f"p50 {winner.latency_ms:.3g} ms against {other.latency_ms:.3g}"
    sizes = f"{winner.size_bytes / 1e6:.3g} MB against {other.size_bytes / 1e6:.3g}"
    if objective == "most_accurate":
        shares = f"{winner.share:.4f} against {other.share:.4f}"
        return f"more accurate ({shares})" if winner.share > other.share else f"as accurate and faster ({speeds})"
    if objective == "smallest":
        return f"as small and faster ({speeds})" if other in tied else f"smaller ({sizes})"
    if objective == "cheapest":
        speeds = f"{winner.rate:,.0f} images a second against {other.rate:,.0f}"
    word = {"fastest": "fast", "cheapest": "cheap"}[objective]
    if other in tied:
        return f"as {word} within the rounds of the measurement, and no larger ({sizes})"
    return f"{word}er ({speeds})"


def _below(one: Variant, best: Variant) -> str:
    told = ""
    if one.difference is not None:
        told = f" [{-one.difference.high * 100:.2f}, {-one.difference.low * 100:.2f}]"
    return f"{(best.share - one.share) * 100:.2f} points{told} below"


def not_beaten(variants: Sequence[Variant], cost: Callable[[Variant], float]) -> list[Variant]:
    """The variants than which no other one is both as accurate and as cheap, and better in one of them; cheapest first."""

    def beats(one: Variant, other: Variant) -> bool:
        mine, theirs = (-one.share, cost(one)), (-other.share, cost(other))
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))

    kept = [one for one in variants if not any(beats(other, one) for other in variants)]
    return sorted(kept, key=lambda one: (cost(one), one.name))


def _points(share: float) -> str:
    return f"{share * 100:.3g} {'point' if share == 0.01 else 'points'}"
