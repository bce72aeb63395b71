"""How many models were judged on one frozen test set: the best of many owes a part of its figures to chance.

Pure functions of ledger rows. Source: Dwork et al., "The reusable holdout" (2015), on what looking again does to a test set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from registry.ledger import Entry
from registry.policies import by_gates


@dataclass(frozen=True)
class HoldoutUse:
    """Which of the models that were judged on a test set one is."""

    place: int
    """1 for the first."""
    num_models: int
    """All that were judged on it until now, this one included."""

    def told(self, num_images: int) -> str:
        """One sentence for whoever reads the figures."""
        pictures = f"these {num_images} test pictures" if num_images != 1 else "this one test picture"
        if self.num_models == 1:
            return f"The first model judged on {pictures}"
        judged = f"model judged on {pictures}"
        if self.num_models > self.place:
            judged = f"of {self.num_models} models judged on {pictures} until now"
        return f"The {_ordinal(self.place)} {judged}; the more there were, the more the best of them owes to chance"


def holdout_use(entries: Sequence[Entry], *, split: str, subject: str) -> HoldoutUse:
    """Counts candidates, requested or refused by the gates, by their digests; `entries` are those of all models.

    `split` is the digest of the test images and their labels: with one more picture, or another label, it is another test
    set, and counting begins anew. `subject` is the digest of the candidate asked about; without a row, it is the next one.
    """
    judged = dict.fromkeys(
        entry.subject
        for entry in entries
        if (entry.kind == "requested" or by_gates(entry)) and entry.body.get("bound", {}).get("split") == split
    )
    order = list(judged | {subject: None})
    return HoldoutUse(order.index(subject) + 1, len(order))


def _ordinal(number: int) -> str:
    endings = {1: "st", 2: "nd", 3: "rd"} if number % 100 not in (11, 12, 13) else {}
    return str(number) + endings.get(number % 10, "th")
