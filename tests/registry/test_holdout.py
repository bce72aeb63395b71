"""Which of the models that were judged on a frozen test set one is, by the rows of the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from registry.approval import person
from registry.holdout import HoldoutUse, holdout_use
from registry.ledger import Ledger


def test_models_are_counted_once_each_by_the_test_set_that_they_were_judged_on(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")

    def row(kind: Any, subject: str, split: str | None = "these", *, model: str = "m", **body: Any) -> None:
        bound = {"bound": {"split": split}} if split else {}
        ledger.append(
            kind, model=model, subject=subject, actor=person("Tom"), body=bound | body, key=str(len(ledger.entries()))
        )

    assert holdout_use(ledger.entries(), split="these", subject="new") == HoldoutUse(1, 1)
    row("rejected", "first", status="fail")
    row("requested", "second", version="1")
    # Neither decisions nor promotions look at pictures, nor does a model of before the test set was bound.
    row("approved", "second", version="1")
    row("rejected", "other", version="2")
    row("promoted", "second", version="1")
    row("rejected", "older", None, status="fail")
    row("rejected", "elsewhere", "others", status="fail")
    row("requested", "third", model="another", version="1")
    row("rejected", "second", status="fail")
    row("requested", "fourth", version="3")

    def use(subject: str) -> HoldoutUse:
        return holdout_use(ledger.entries(), split="these", subject=subject)

    assert [use(name) for name in ("first", "second", "third", "fourth")] == [HoldoutUse(n, 4) for n in (1, 2, 3, 4)]
    assert use("new") == HoldoutUse(5, 5)


@pytest.mark.parametrize(
    ("use", "told"),
    [
        (HoldoutUse(1, 1), "The first model judged on these 860 test pictures"),
        (HoldoutUse(12, 12), "The 12th model judged on these 860 test pictures; the more there were, the more"),
        (HoldoutUse(1, 23), "The 1st of 23 models judged on these 860 test pictures until now; the more there were"),
        (HoldoutUse(22, 23), "The 22nd of 23 models judged"),
        (HoldoutUse(111, 111), "The 111th model judged"),
        (HoldoutUse(3, 3), "The 3rd model judged"),
    ],
)
def test_the_count_is_told_in_a_sentence(use: HoldoutUse, told: str) -> None:
    assert use.told(860).startswith(told)
    assert ("owes to chance" in use.told(860)) == (use.num_models > 1)
