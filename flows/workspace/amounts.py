"""What an amount of images can prove: said when they are added, before anybody trains."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from components.contracts.errors import ConfigError
from components.contracts.wording import counted
from components.gating import least
from components.intervals import wilson
from flows.workspace.recipes import SHIPPED, RunConfig, peek, recipe_files

_DEFAULT = "transfer"
_MOST_CLASSES = 5
"""So many classes a gate are named in a sentence."""


@dataclass(frozen=True)
class Missing:
    """What a gate of a recipe lacks before it can pass, even where every answer is right."""

    gate: str
    has: int
    needs: int | None
    """Test images; None where no number would do."""
    label: str = ""
    """The class whose test images are meant; empty for all of them."""
    against_champion: bool = False

    def __str__(self) -> str:
        what = f"test images of {self.label!r}" if self.label else "test images"
        when = " once there is a champion" if self.against_champion else ""
        if self.needs is None:
            return f"{self.gate} can be passed with no number of {what}{when}"
        return f"{self.gate} needs {self.needs} {what}{when}"


@dataclass(frozen=True)
class Amount:
    """What the test images of a data version can and cannot decide by a recipe's gates."""

    recipe: str
    num_test: int
    missing: tuple[Missing, ...]
    more_for_first: int | None
    """Images to add, of which the frozen share becomes test, until a first model can pass; None where no number would do."""
    more_for_successor: int | None
    """The same until a model can pass that is compared with a champion, too."""

    def told(self) -> str:
        """One sentence or two for whoever added the images; empty where nothing is missing."""
        if not self.missing:
            return ""
        lacks = f"By the gates of recipe {self.recipe}, {'; '.join(_shown(self.missing))}"
        if self.more_for_first == 0:
            return f"{self._proves()}. {lacks}: {self._more('a successor', self.more_for_successor)}"
        first = self._more("a first model", self.more_for_first)
        later = (
            ""
            if self.more_for_successor == self.more_for_first
            else f", and its successor with {self.more_for_successor} more"
        )
        return f"{self._proves()}. {lacks}: {first}{later}"

    def _proves(self) -> str:
        if self.num_test == 0:
            return "Without a test image nothing is proven"
        num_right = self.num_test - max(1, round(0.05 * self.num_test))
        best, likely = wilson(self.num_test, self.num_test), wilson(num_right, self.num_test)
        return (
            f"{counted(self.num_test, 'test image')} can prove an accuracy of at most {best.low:.3f}, if every answer is "
            f"right; at {likely.value:.2f} the interval reaches from {likely.low:.2f} to {likely.high:.2f}"
        )

    def _more(self, who: str, number: int | None) -> str:
        if number is None:
            return f"{who} cannot pass whatever is added; change the gate"
        return f"{who} can pass with {counted(number, 'more image')} added"


def _shown(missing: Sequence[Missing]) -> Iterator[str]:
    """What is missing, of each gate the first few classes: there may be thousands."""
    for gate, of_gate in itertools.groupby(missing, key=lambda each: each.gate):
        found = list(of_gate)
        yield from map(str, found[:_MOST_CLASSES])
        if len(found) > _MOST_CLASSES:
            yield f"{gate} lacks test images of {len(found) - _MOST_CLASSES} more classes"


def amounts(test_counts: Mapping[str, int], test_share: float, *, workspace: Path) -> list[Amount]:
    """For each recipe of the workspace (the shipped `transfer` where it has none) what its gates lack.

    `test_counts` are the test images of each class. A recipe that cannot be used is passed over: `recipe list` tells why.
    """
    files = recipe_files(workspace)
    own = [name for name, path in sorted(files.items()) if path.parent != SHIPPED]
    found = []
    for name in own or [_DEFAULT]:
        with contextlib.suppress(ConfigError):
            found.append(_amount(peek(files[name]), test_counts, test_share))
    return found


def _amount(config: RunConfig, test_counts: Mapping[str, int], test_share: float) -> Amount:
    num_test = sum(test_counts.values())
    missing: list[Missing] = []
    fp32_alone = all(target.precision == "fp32" for target in config.export.targets)
    for gate, needs in least(config.gating).items():
        if needs.below_fp32_alone and fp32_alone:
            continue
        if needs.images is None or num_test < needs.images:
            missing.append(Missing(gate, num_test, needs.images, against_champion=needs.against_champion))
        missing += [
            Missing(gate, count, needs.of_each_class, label, needs.against_champion)
            for label, count in sorted(test_counts.items())
            if count < needs.of_each_class
        ]
    first = [each for each in missing if not each.against_champion]
    return Amount(config.name, num_test, tuple(missing), _more(first, test_share), _more(missing, test_share))


def _more(missing: Sequence[Missing], test_share: float) -> int | None:
    """How many images to add until nothing of this is missing; None where no number would do."""
    of_class: dict[str, int] = {}
    overall = 0
    for each in missing:
        if each.needs is None:
            return None
        if each.label:
            of_class[each.label] = max(of_class.get(each.label, 0), each.needs - each.has)
        else:
            overall = max(overall, each.needs - each.has)
    return math.ceil(max(sum(of_class.values()), overall) / test_share)
