"""Choosing: which of the engines that passed every gate is served. A pure function of what was found out about them.

The recipe's limits come first, then speed, then size: engines whose rounds of measurement overlap are as fast as one
another, or a second measurement would change what is served without a cause. How much an engine drops is the paired
difference of the headline metric to the trained module's on the same test images; a choice has to be made, so a limit is
held against the value, and its interval is told beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from components.contracts.records import Record
from components.contracts.verdicts import Estimate
from components.contracts.wording import counted

AUTO = "auto"
"""What a recipe serves when the choice is left to its limits."""


class Limits(Record):
    """What an engine may cost at most; what is not named is not limited."""

    p99_ms: float | None = Field(default=None, gt=0)
    """Latency of single images, on the machine that measured it."""
    size_mb: float | None = Field(default=None, gt=0)
    """Of its files, in 10^6 bytes."""
    memory_mb: float | None = Field(default=None, gt=0)
    """What loading it and answering adds to a process of its own, at the height, runtime included; in 10^6 bytes."""
    drop: float | None = Field(default=0.01, ge=0, lt=1)
    """By how much its share of right answers may lie below the trained module's."""


@dataclass(frozen=True)
class Offer:
    """One engine as the choice sees it."""

    engine: str
    passed: bool
    """Whether it passed every gate."""
    is_undecided: bool = False
    """Whether more evidence could let one pass that did not."""
    p50_ms: float | None = None
    rounds_p50_ms: tuple[float, ...] = ()
    """The median latency of each round that it was measured in."""
    p99_ms: float | None = None
    size_mb: float = 0.0
    memory_mb: float | None = None
    drop: Estimate | None = None
    """How much lower its share of right answers is than the trained module's."""

    @property
    def fastest_ms(self) -> float:
        """Of its rounds, whose extremes enclose the median of so few in 94 of 100 cases."""
        return min(self.rounds_p50_ms, default=_speed(self))

    @property
    def slowest_ms(self) -> float:
        return max(self.rounds_p50_ms, default=_speed(self))

    def missed(self, limits: Limits) -> list[str]:
        """The limits that it does not meet, or is not known to meet, in words."""
        found = []
        for what, limit, value, unit in (
            ("p99 latency", limits.p99_ms, self.p99_ms, "ms"),
            ("size", limits.size_mb, self.size_mb, "MB"),
            ("memory", limits.memory_mb, self.memory_mb, "MB"),
        ):
            if limit is not None and value is None:
                found.append(f"{what} not measured, at most {limit:g} {unit}")
            elif limit is not None and value is not None and value > limit:
                found.append(f"{what} {value:.3g} {unit}, at most {limit:g}")
        if limits.drop is not None and self.drop is None:
            found.append(f"drop not measured, at most {_points(limits.drop)}")
        elif limits.drop is not None and self.drop is not None and self.drop.value > limits.drop:
            told = f"[{self.drop.low * 100:.2f}, {self.drop.high * 100:.2f}]"
            found.append(f"drops {_points(self.drop.value)} {told}, at most {_points(limits.drop)}")
        return found


@dataclass(frozen=True)
class Choice:
    """The engine that is served, or the one that came nearest to it."""

    engine: str
    """Empty where there is no engine at all."""
    is_servable: bool
    """Whether it passed every gate and meets every limit."""
    told: dict[str, str]
    """What the choice says of each engine that passed its gates."""


def choose(offers: Sequence[Offer], limits: Limits) -> Choice:
    """The fastest engine that passed every gate and meets every limit; of those as fast as it, the smallest.

    Where there is none: of those that passed, the one that misses fewest limits; of others, the undecided one that misses
    fewest, which is told, else the first one.
    """
    passed = [offer for offer in offers if offer.passed]
    missed = {offer.engine: offer.missed(limits) for offer in passed}
    order = sorted(passed, key=lambda offer: (len(missed[offer.engine]), _speed(offer), offer.engine))
    if not order:
        undecided = [offer for offer in offers if offer.is_undecided]
        nearest = min(undecided, key=lambda offer: len(offer.missed(limits)), default=next(iter(offers), None))
        # Whoever excepts a gate excepts no limit.
        missing = nearest.missed(limits) if nearest is not None and nearest.is_undecided else []
        told = (
            {nearest.engine: f"misses the recipe's limits: {'; '.join(missing)}"} if nearest is not None and missing else {}
        )
        return Choice(nearest.engine if nearest else "", False, told)
    best = order[0]
    is_servable = not missed[best.engine]
    met = [offer for offer in order if not missed[offer.engine]]
    # Compared with the one whose slowest round is fastest, not with the fastest median, which may be another one tomorrow.
    bound = min((offer.slowest_ms for offer in met), default=0.0)
    tied = [offer for offer in met if offer.fastest_ms <= bound]
    if tied:
        best = min(tied, key=lambda offer: (offer.size_mb, offer.engine))
    told = {}
    for offer in passed:
        if missed[offer.engine]:
            told[offer.engine] = f"misses the recipe's limits: {'; '.join(missed[offer.engine])}"
        elif offer is not best:
            how = "as fast within the rounds of the measurement, and no larger" if offer in tied else "faster"
            sizes = f", {best.size_mb:.3g} MB against {offer.size_mb:.3g}" if offer in tied else ""
            told[offer.engine] = f"meets every limit; {best.engine} is {how} ({_ms(best)} against {_ms(offer)}{sizes})"
    if is_servable:
        faster = [other for other in passed if missed[other.engine] and _speed(other) < _speed(best)]
        decided = "".join(f"; {other.engine} is faster ({_ms(other)}) but {told[other.engine]}" for other in faster)
        of = f"the fastest of {len(met)} that meet every limit" if len(met) > 1 else "the one that meets every limit"
        if len(tied) > 1:
            of = f"the smallest of {len(tied)} whose rounds overlap, of {len(met)} that meet every limit"
        told[best.engine] = f"chosen of {counted(len(passed), 'engine')} that passed every gate: {of} ({_ms(best)}){decided}"
    return Choice(best.engine, is_servable, told)


def _speed(offer: Offer) -> float:
    return float("inf") if offer.p50_ms is None else offer.p50_ms


def _ms(offer: Offer) -> str:
    return "latency not measured" if offer.p50_ms is None else f"p50 {offer.p50_ms:.3g} ms"


def _points(share: float) -> str:
    return f"{share * 100:.3g} {'point' if share == 0.01 else 'points'}"


def images_a_second_a_core(p50_ms: float, num_threads: int) -> float:
    """Single images, one after another, of each core that the engine was given."""
    return 1000.0 / p50_ms / num_threads


def price_of_a_million(ms_an_image: float, hourly_price: float) -> float:
    """What a million answers that take so long each cost on a machine of that price an hour; in its currency."""
    return 1e6 * ms_an_image / 1000.0 / 3600.0 * hourly_price
