from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.contracts import shown_utc
from registry import policies
from registry.approval import person
from registry.ledger import Entry, Ledger, Principal

FLOW = Principal(name="flows/train", method="machine")


def policy(*, engines: tuple[str, ...] = ("e", "f"), optional: tuple[str, ...] = (), **gates: Any) -> dict[str, Any]:
    """A policy as summaries hold it; a gate is its settings, or those with the engines that it judges."""
    return {
        "gates": [
            {"gate": name, "settings": value, "engines": []}
            if isinstance(value, dict)
            else {"gate": name, "settings": value[0], "engines": list(value[1])}
            for name, value in gates.items()
        ],
        "engines": {name: {"required": name not in optional} for name in engines},
        "serving": engines[0],
    }


FIRST = policy(
    accuracy={"floor": 0.9}, parity={"min_agreement": {"fp32": 0.999, "int8": 0.98}}, latency={"max_p99_ms": 50.0}
)


@pytest.mark.parametrize(
    ("after", "told"),
    [
        (FIRST, []),
        ({"accuracy": {"floor": 0.75}}, ["accuracy.floor 0.9 -> 0.75 (looser)"]),
        ({"accuracy": {"floor": 0.95}}, ["accuracy.floor 0.9 -> 0.95 (tighter)"]),
        ({"latency": {"max_p99_ms": 80.0}}, ["latency.max_p99_ms 50 -> 80 (looser)"]),
        (
            {"parity": {"min_agreement": {"fp32": 0.999, "int8": 0.9}}},
            ["parity.min_agreement.int8 0.98 -> 0.9 (looser)"],
        ),
        ({"latency": None}, ["latency no longer judges (looser)"]),
        ({"accuracy": ({"floor": 0.9}, ("f",))}, ["accuracy no longer judges for e (looser)"]),
        ({"no_regression": {"margin": 0.02}}, ["no_regression judges (tighter)"]),
        ({"optional": ("f",)}, ["f is no longer required (looser)"]),
        ({"engines": ("e",)}, ["f is no longer built or judged (looser)"]),
        (
            {"mine": {"colour": "red"}, "accuracy": {"floor": 0.9, "mode": "x"}},
            ["accuracy.mode unset -> x (changed)", "mine judges (tighter)"],
        ),
    ],
)
def test_what_of_a_policy_changed_is_told_with_its_direction(after: dict[str, Any], told: list[str]) -> None:
    gates = {gate["gate"]: gate["settings"] for gate in FIRST["gates"]}
    changed = FIRST if after is FIRST else policy(**{k: v for k, v in {**gates, **after}.items() if v is not None})
    assert policies.changes(FIRST, changed) == told


def judged(ledger: Ledger, key: str, kind: str, chosen: dict[str, Any] | None, **body: Any) -> Entry:
    bound = {"weights": body.pop("weights", "w"), "policy": repr(chosen), "champion": "none"}
    summary = {"policy": chosen} if chosen else {}
    body = {"status": "fail", "reasons": ["accuracy too low"], "bound": bound, "summary": summary, **body}
    return ledger.append(kind, model="m", subject=key, actor=person("Tom"), body=body, key=key)  # type: ignore[arg-type]


def test_an_approver_is_told_what_was_loosened_and_what_these_weights_failed(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    strict, loose = policy(accuracy={"floor": 0.9}), policy(accuracy={"floor": 0.75})
    judged(ledger, "older", "requested", None, version="1", weights="other")
    ledger.append("promoted", model="m", subject="older", actor=FLOW, body={"version": "1"}, key="p")
    judged(ledger, "a", "rejected", strict)
    judged(ledger, "b", "rejected", strict, status="inconclusive", reasons=["too few test images to decide"])
    asked = judged(ledger, "c", "requested", loose, version="2")
    told = policies.notes(ledger.entries("m"), asked.body, subject="c")
    at = [shown_utc(entry.at) for entry in ledger.entries("m")]
    assert told == [
        "The gate policy is not the champion's (version 1); how it differs was not recorded then.",
        f"The gate policy is not that of the undecided run of {at[3]} (ledger row 4): accuracy.floor 0.9 -> 0.75 (looser).",
        f"These weights before: rejected by the gates at {at[2]} (ledger row 3): accuracy too low",
        f"These weights before: undecided at {at[3]} (ledger row 4): too few test images to decide",
    ]
    same = judged(ledger, "d", "requested", strict, version="3", weights="new")
    assert policies.notes(ledger.entries("m"), same.body, subject="d") == told[:1]


def test_the_account_behind_two_declared_names_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    account: dict[str, Any] = {"user": "root", "uid": 0, "host": "here", "login": None}
    monkeypatch.setattr("registry.ledger.account", lambda: account)
    asked = judged(ledger, "c", "requested", None, version="2")
    body = {"version": "2", "reason": "good"}
    decide: Any = lambda key: ledger.append("approved", model="m", subject="c", actor=person("Ann"), body=body, key=key)  # noqa: E731
    told = policies.account_note(decide("1"), asked)
    assert told is not None
    assert told.startswith("declared as Ann by the account that also asked for the training (root)")
    account = {**account, "uid": 1000, "user": "ann"}
    assert policies.account_note(decide("2"), asked) is None
    older = asked.model_copy(update={"body": {}})
    assert policies.account_note(decide("3"), older) is None
