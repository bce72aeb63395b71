"""Versions, decisions and rows of the ledger as JSON data: what `--json` prints and the console's API answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.workspace.versions import State, VersionShown
    from registry.ledger import Entry


def state_json(state: State) -> dict[str, Any]:
    """Where a version stands, and what its approver was told."""
    decision = state.decision
    return {
        "version": state.version,
        "status": state.status,
        "requested_by": state.requested.actor.name,
        "requested_at": state.requested.at,
        "decided_by": decision.actor.name if decision else None,
        "decided_at": decision.at if decision else None,
        "reason": decision.body.get("reason") if decision else None,
        "expires_at": decision.body.get("expires_at") if decision else None,
        "undecided": list(state.undecided),
        "exceptions": exceptions_json(state.exceptions),
        "candidate_digest": state.requested.subject,
        "summary": state.requested.body.get("summary") or {},
    }


def exceptions_json(exceptions: Mapping[str, Entry]) -> dict[str, Any]:
    """Exceptions by gate: who answers for it, until when and why."""
    return {
        gate: {"by": e.actor.name, "at": e.at, "seq": e.seq, "reason": e.body["reason"], "expires_at": e.body["expires_at"]}
        for gate, e in exceptions.items()
    }


def version_json(model: str, shown: VersionShown) -> dict[str, Any]:
    """A version with all that a person decides on."""
    return state_json(shown.state) | {
        "model": model,
        "bound": shown.state.requested.body["bound"],
        "champion_version": shown.champion.body["version"] if shown.champion else None,
        "compared_with": shown.compared_with.body["version"] if shown.compared_with else None,
        "notes": list(shown.notes),
        "same_account": shown.same_account,
        "report": str(shown.report) if shown.report else None,
        "holdout": {"place": shown.holdout.place, "num_models": shown.holdout.num_models} if shown.holdout else None,
    }


def row_json(entry: Entry, *, by_gates: bool = False) -> dict[str, Any]:
    """A row for machines: without the summary, which `show` prints."""
    body = {name: value for name, value in entry.body.items() if name != "summary"}
    return {
        "decided_by": "the gates" if by_gates else (entry.actor.name if entry.actor.method != "machine" else None),
        "seq": entry.seq,
        "at": entry.at,
        "kind": entry.kind,
        "model": entry.model,
        "actor": entry.actor.name,
        "actor_method": entry.actor.method,
        "body": body,
        "hash": entry.hash,
    }
