from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.contracts.wording import shown_utc
from registry import policies
from registry.approval import person
from registry.ledger import Entry, Ledger, Principal

FLOW = Principal(name="flows/train", method="machine")


def policy(
    *,
    engines: tuple[str, ...] = ("e", "f"),
    optional: tuple[str, ...] = (),
    serving: str = "e",
    limits: dict[str, Any] | None = None,
    **gates: Any,
) -> dict[str, Any]:
    """A policy as summaries hold it; a gate is its settings, or those with the engines that it judges."""
    return {
        "gates": [
            {"gate": name, "settings": value, "engines": []}
            if isinstance(value, dict)
            else {"gate": name, "settings": value[0], "engines": list(value[1])}
            for name, value in gates.items()
        ],
        "engines": {name: {"required": name not in optional} for name in engines},
        "serving": serving,
        **({"limits": limits} if limits is not None else {}),
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
        ({"engines": ("e", "f", "g")}, ["g is new"]),
        ({"serving": "f"}, ["it serves f instead of e"]),
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


def test_a_floor_that_is_set_is_tighter_and_one_that_is_unset_is_looser() -> None:
    def robust(**settings: Any) -> dict[str, Any]:
        return policy(robustness={"margin": 0.03, "floor": None, "min_stability": {}} | settings)

    floors = robust(floor=0.5, min_stability={"flip": 0.9, "shift": 0.8})
    assert policies.changes(robust(), floors) == [
        "robustness.floor unset -> 0.5 (tighter)",
        "robustness.min_stability.flip unset -> 0.9 (tighter)",
        "robustness.min_stability.shift unset -> 0.8 (tighter)",
    ]
    assert policies.changes(floors, robust(margin=0.05, min_stability={"flip": 0.95})) == [
        "robustness.floor 0.5 -> unset (looser)",
        "robustness.margin 0.03 -> 0.05 (looser)",
        "robustness.min_stability.flip 0.9 -> 0.95 (tighter)",
        "robustness.min_stability.shift 0.8 -> unset (looser)",
    ]


def test_limits_that_choose_the_served_engine_are_part_of_the_policy() -> None:
    def chosen(**limits: Any) -> dict[str, Any]:
        return policy(limits={"drop": 0.01, "p99_ms": None, "size_mb": 20.0} | limits)

    assert policies.changes(chosen(), chosen(drop=0.05, p99_ms=9.0, size_mb=None)) == [
        "limits.drop 0.01 -> 0.05 (looser)",
        "limits.p99_ms unset -> 9 (tighter)",
        "limits.size_mb 20 -> unset (looser)",
    ]
    assert policies.changes(policy(), chosen()) == [
        "the engine that is served is chosen, no longer named, within the limits drop 0.01, size_mb 20 (changed)"
    ]
    assert policies.changes(chosen(), policy()) == [
        "the recipe names the engine that is served, no limits choose it (changed)"
    ]


def test_settings_of_one_gate_that_judges_twice_and_of_engines_that_do_not_count() -> None:
    twice = {"gates": [{"gate": "recall", "settings": {"floor": f, "margin": f}, "engines": []} for f in (0.5, 0.7)]}
    before = policy(optional=("f",)) | twice
    after = policy(engines=("e",)) | {"gates": [*twice["gates"][:1], {**twice["gates"][1], "settings": {"margin": 0.9}}]}
    assert policies.changes(before, after) == [
        "recall #2.floor 0.7 -> unset (changed)",
        "recall #2.margin 0.7 -> 0.9 (looser)",
        "f is no longer built or judged (it was not required)",
    ]


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
    # What came after the request is none of its past, but for what a person said of the same weights.
    judged(ledger, "later", "rejected", policy(accuracy={"floor": 0.8}), weights="other")
    assert policies.notes(ledger.entries("m"), asked.body, subject="c") == told
    same = judged(ledger, "d", "requested", strict, version="3", weights="new")
    ledger.append(
        "rejected", model="m", subject="d", actor=person("Ann"), body={"version": "3", "reason": "blurred"}, key="r"
    )
    again = judged(ledger, "e", "requested", strict, version="4", weights="new")
    refused = ledger.entries("m")[-2]
    assert policies.notes(ledger.entries("m"), again.body, subject="e") == [
        told[0],
        policies.notes(ledger.entries("m"), same.body, subject="d")[1],
        f"These weights before: rejected by Ann as version 3 at {shown_utc(refused.at)} (ledger row {refused.seq}): blurred",
    ]
    # Champion again after a rollback; of many rejections the latest three are compared with.
    ledger.append("rolled_back", model="m", subject="c", actor=FLOW, body={"version": "2"}, key="back")
    for floor in (0.1, 0.2, 0.3, 0.4):
        judged(ledger, f"f{floor}", "rejected", policy(accuracy={"floor": floor}), weights="other")
    bound = {**again.body["bound"], "policy": "the same settings, other code"}
    found = policies.notes(ledger.entries("m"), {**again.body, "bound": bound})
    assert [line.partition("): ")[2] for line in found[:4]] == [
        "accuracy.floor 0.75 -> 0.9 (tighter).",
        "accuracy.floor 0.4 -> 0.9 (tighter).",
        "accuracy.floor 0.3 -> 0.9 (tighter).",
        "accuracy.floor 0.2 -> 0.9 (tighter).",
    ]
    assert found[4].startswith("These weights before")
    bound = {**asked.body["bound"], "policy": "the same settings, other code"}
    assert policies.notes(ledger.entries("m"), {**asked.body, "bound": bound})[0] == (
        "The gate policy has the settings of the champion's (version 2), but the gates' own code changed since."
    )


def test_the_account_behind_two_declared_names_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    account: dict[str, Any] = {"user": "root", "uid": 0, "host": "here", "login": None}
    monkeypatch.setattr("registry.ledger.account", lambda: account)
    asked = judged(ledger, "c", "requested", None, version="2")

    def told(by: Principal | None = None, *, of: Entry = asked, **of_account: Any) -> str | None:
        nonlocal account
        account = {"user": "root", "uid": 0, "host": "here", "login": None, **of_account}
        body = {"version": "2", "reason": "good"}
        key = str(len(ledger.entries()))
        entry = ledger.append("approved", model="m", subject="c", actor=by or person("Ann"), body=body, key=key)
        return policies.account_note(entry, of)

    found = told()
    assert found is not None
    assert found.startswith("declared as Ann by the account that also asked for the training (root)")
    by_machine = asked.model_copy(update={"actor": FLOW})
    assert "the training ran under (root)" in str(told(of=by_machine))
    assert told(login="ann") is not None  # the other's is not known
    with_login = asked.model_copy(update={"body": {"account": {"user": "root", "uid": 0, "host": "here", "login": "tom"}}})
    assert told(of=with_login, login="tom") is not None
    # Another account, machine or login, a name that was verified, and rows of before accounts were recorded.
    assert [
        told(uid=1000, user="ann"),
        told(host="elsewhere"),
        told(of=with_login, login="ann"),
        *(told(person("Ann", method)) for method in ("token", "password", "oidc")),
        told(of=asked.model_copy(update={"body": {}})),
    ] == [None] * 7
