"""The map of a promotion: check everything again, publish the release, move the ledger, project, read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import flow, task

from flows.orchestrator.notifications import notify
from flows.orchestrator.retries import REGISTRY_POLICY
from flows.terminal import silent, to_stderr
from flows.workspace.desk import desk
from registry.ledger import Entry
from registry.promotion import Promotion


@task(name="promotion", **REGISTRY_POLICY)
def promotion(promoting: Promotion, version: str, say: Callable[[str], None]) -> Entry:
    """One repeatable sequence: a retry, like a second run, goes on where it stopped."""
    return promoting.promote(version, say=say)


@flow(name="promote", validate_parameters=False)
def promote(version: str, model: str | None = None, workspace: str = ".", quiet: bool = True) -> dict[str, Any]:
    """Promote an approved version; repeating it after any failure goes on where it stopped."""
    say = silent if quiet else to_stderr
    found = desk(Path(workspace), model)
    entry = promotion(found.promotion, version, say)
    approver = next(e.actor.name for e in found.ledger.entries(found.model) if e.seq == entry.body["approved_seq"])
    facts = {"version": version, "by": entry.actor.name, "reason": f"approved by {approver}", "seq": entry.seq}
    notify(found.settings, "promoted", found.model, facts, say=say)
    return {"model": found.model, "version": version, "ledger_seq": entry.seq, "release": entry.body["release"]}
