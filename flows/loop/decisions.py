"""What a person decides about a model's versions: except, approve, reject, go back, mend what points elsewhere.

A decision is a row of the ledger first; that MLflow shows it and that people hear of it comes after, and may fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from components.contracts.errors import VisionloopError
from components.contracts.wording import shown_utc
from flows.orchestrator.notifications import notify
from flows.terminal import Say
from flows.workspace.desk import Desk
from flows.workspace.versions import notes_on
from registry import approval
from registry.ledger import Entry, Principal, Rule
from registry.policies import account_note
from registry.promotion import Difference


@dataclass(frozen=True)
class Excepted:
    """An exception that is on record."""

    entry: Entry
    missing: tuple[str, ...]
    """The gates of the version that are still undecided and excepted by nobody."""
    same_account: str | None


@dataclass(frozen=True)
class Approved:
    """An approval that is on record."""

    entry: Entry
    same_account: str | None
    """Said of an approval by the account that also asked for the training."""


def declared(name: str) -> Principal:
    """A person by the name that they give, which nobody checks; raises ConfigError for one that names nobody."""
    return approval.person(name)


def approve(
    desk: Desk, version: str, by: Principal, reason: str, *, days: float, say: Say, also: Sequence[str] = ()
) -> Approved:
    """Approve a candidate for so many days; what its approver has to know is told first, and kept with the approval.

    `also` are other names of the same person, none of whom may have asked for the training.

    Raises DecisionRefused, ConfigError or UnknownName.
    """
    entries = desk.ledger.entries(desk.model)
    state = approval.state_of(entries, version, desk.ledger.now())
    shown = [*notes_on(entries, state)]
    if state.left is not None:
        shown.append(
            f"Version {version} was left by a rollback of {state.left.actor.name} at {shown_utc(state.left.at)}: "
            f"{state.left.body['reason']}"
        )
    for line in shown:
        say(line)
    entry = _decide(desk, by, approval.approve(version, by, reason, days=days, shown=shown, also=also), say)
    return Approved(entry, account_note(entry, state.requested))


def except_gates(
    desk: Desk,
    version: str,
    by: Principal,
    gates: Sequence[str],
    reason: str,
    *,
    days: float,
    say: Say,
    also: Sequence[str] = (),
) -> Excepted:
    """Answer for gates that did not decide on a version, for so many days; what to know of it is told first.

    Raises DecisionRefused, ConfigError or UnknownName.
    """
    entries = desk.ledger.entries(desk.model)
    state = approval.state_of(entries, version, desk.ledger.now())
    for line in notes_on(entries, state):
        say(line)
    entry = _decide(desk, by, approval.except_gates(version, by, gates, reason, days=days, also=also), say)
    left = approval.state_of(desk.ledger.entries(desk.model), version, desk.ledger.now()).missing
    return Excepted(entry, left, account_note(entry, state.requested))


def reject(desk: Desk, version: str, by: Principal, reason: str, *, withdraw: bool, say: Say) -> Entry:
    """Reject a candidate, also an approved one with `withdraw`. Raises DecisionRefused, ConfigError or UnknownName."""
    return _decide(desk, by, approval.reject(version, by, reason, withdraw=withdraw), say)


def rollback(desk: Desk, to: str | None, by: Principal, reason: str, *, say: Say, moving: Say) -> Entry:
    """Make an earlier champion the champion again, the one before by default; `moving` hears of each step.

    Raises DecisionRefused, ConfigError, UnknownName, or what keeps the release from being served.
    """
    entry = desk.promotion.rollback(to, by, reason, say=moving)
    _notify(desk, entry, say)
    return entry


def reconcile(desk: Desk, *, repair: bool) -> list[Difference]:
    """What servers and MLflow are told and the ledger does not say, mended with `repair`."""
    return desk.promotion.reconcile(repair=repair)


def _decide(desk: Desk, by: Principal, rule: Rule, say: Say) -> Entry:
    entry = desk.ledger.decide(model=desk.model, actor=by, rule=rule)
    try:
        desk.promotion.describe(say=say)
    except VisionloopError as error:
        # It is decided: MLflow only shows it.
        say(f"MLflow's descriptions are behind ({error}); `visionloop reconcile --repair` writes them")
    _notify(desk, entry, say)
    return entry


def _notify(desk: Desk, entry: Entry, say: Say) -> None:
    gates = f"{', '.join(entry.body['gates'])}: " if entry.kind == "excepted" else ""
    reason = gates + entry.body["reason"]
    facts = {"version": entry.body["version"], "by": entry.actor.name, "reason": reason, "seq": entry.seq}
    notify(desk.settings, entry.kind, desk.model, facts, say=say)
