"""What the ledger tells about a model's versions, for a person who looks at them or decides. Nothing is changed here."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.workspace.desk import Desk
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace
from registry import approval
from registry.approval import State as State  # what the functions here answer with
from registry.holdout import HoldoutUse, holdout_use
from registry.ledger import Entry, Ledger, Principal
from registry.policies import account_note, by_gates, notes


@dataclass(frozen=True)
class Row:
    """A row of the ledger."""

    entry: Entry
    by_gates: bool
    """Whether it is the gates' rejection of a model, and not a person's of a version: its actor asked for the training."""


@dataclass(frozen=True)
class VersionShown:
    """A version with all that a person decides on."""

    state: State
    champion: Entry | None
    """Which version is champion now."""
    compared_with: Entry | None
    """The champion that the version was compared with."""
    notes: tuple[str, ...]
    """How its gate policy differs from earlier ones, and what these weights failed before."""
    same_account: str | None
    """Said of a decision by the account that also asked for the training."""
    report: Path | None
    holdout: HoldoutUse | None
    """Which of the models that were judged on its test set it is; None of a version whose row names no test set."""

    @property
    def is_fresh(self) -> bool:
        """Whether it was compared with today's champion; else it can no longer be approved or promoted."""
        return is_fresh(self.state, self.champion)


@dataclass(frozen=True)
class Served:
    """What was champion at a moment, and the approval it rests on."""

    moved: Entry
    """The promotion or the rollback that made it champion."""
    approved: Entry
    exceptions: Mapping[str, Entry]
    """By gate, the exceptions that the approval rests on; none where every gate passed."""


@dataclass(frozen=True)
class LedgerVerified:
    """A ledger whose every row carries the hash of the one before."""

    rows: int
    head: str | None
    """The last hash; None of an empty ledger."""


_OPEN = ("undecided", "waiting", "approved", "expired", "champion")


def candidates(desk: Desk, *, every: bool = False) -> list[State]:
    """Versions that wait for a decision or for their promotion, and the champion; with `every`, also the past."""
    found = approval.states(desk.ledger.entries(desk.model), desk.ledger.now())
    return [state for state in found if every or state.status in _OPEN]


def is_fresh(state: State, champion: Entry | None) -> bool:
    """Whether a version was compared with the champion that a ledger row made."""
    bound: str = state.requested.body["bound"].get("champion", "none")
    return bound == (champion.body["engine"] if champion else "none")


def champion_of(desk: Desk) -> Entry | None:
    """The ledger's row that made today's champion; None before the first."""
    return approval.champion(desk.ledger.entries(desk.model))


def same_person(name: str, actor: Principal) -> bool:
    """Whether a name is that of who wrote a row."""
    return approval.same_person(Principal(name=name, method="declared"), actor)


def show(desk: Desk, version: str) -> VersionShown:
    """One version for the person who decides; raises UnknownName."""
    rows = desk.ledger.entries()
    entries = [entry for entry in rows if entry.model == desk.model]
    state = approval.state_of(entries, version, desk.ledger.now())
    split = state.requested.body["bound"].get("split")
    return VersionShown(
        state=state,
        champion=approval.champion(entries),
        compared_with=approval.compared_with(entries, state.requested),
        notes=notes_on(entries, state),
        same_account=account_note(state.decision, state.requested) if state.decision is not None else None,
        report=_report(desk, state),
        holdout=holdout_use(rows, split=split, subject=state.requested.subject) if split else None,
    )


def notes_on(entries: Sequence[Entry], state: State) -> tuple[str, ...]:
    """What a person has to know of a version's policy and past, from the rows of its model."""
    return tuple(notes(entries, state.requested.body, subject=state.requested.subject))


def _report(desk: Desk, state: State) -> Path | None:
    run = (state.requested.body.get("summary") or {}).get("run", "")
    path = desk.workspace.runs / run / "report.html"
    return path if run and path.is_file() else None


def history(desk: Desk) -> list[Row]:
    """Everything the ledger knows about a model, in order."""
    return [Row(entry, by_gates(entry)) for entry in desk.ledger.entries(desk.model)]


def who_served(desk: Desk, moment: datetime.datetime) -> Served | None:
    """What was champion at a moment; None when nothing was."""
    entries = desk.ledger.entries(desk.model)
    moved = approval.served_at(entries, moment)
    if moved is None:
        return None
    rows = {entry.seq: entry for entry in entries}
    promoted = rows[moved.body["promoted_seq"]] if moved.kind == "rolled_back" else moved
    approved = rows[promoted.body["approved_seq"]]
    return Served(moved, approved, approval.exceptions_of(entries, approved))


@dataclass(frozen=True)
class ServedSpan:
    """A stretch of time in which one version was champion."""

    version: str
    since: str
    until: str | None
    """None of the one that serves now."""
    how: str
    """`promoted` or `rolled back`, and by whom."""
    approved_by: str
    reason: str
    """Of the approval, or of the rollback."""


def served_spans(desk: Desk) -> list[ServedSpan]:
    """What was champion from when to when, the first first."""
    entries = desk.ledger.entries(desk.model)
    rows = {entry.seq: entry for entry in entries}
    moves = [entry for entry in entries if entry.kind in ("promoted", "rolled_back")]
    found = []
    for move, later in zip(moves, [*moves, None][1:], strict=True):
        promoted = rows[move.body["promoted_seq"]] if move.kind == "rolled_back" else move
        approved = rows[promoted.body["approved_seq"]]
        found.append(
            ServedSpan(
                version=str(move.body["version"]),
                since=move.at,
                until=later.at if later is not None else None,
                how="promoted" if move.kind == "promoted" else f"rolled back by {move.actor.name}",
                approved_by=approved.actor.name,
                reason=str(move.body.get("reason") or approved.body["reason"]),
            )
        )
    return found


def verify_ledger(workspace: Workspace) -> LedgerVerified:
    """Check the hash chain of all models' rows, one by one; raises TamperedArtefact."""
    entries = Ledger(read_settings(workspace.state).ledger_url).entries()
    return LedgerVerified(len(entries), entries[-1].hash if entries else None)
