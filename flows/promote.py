"""The map of a promotion: check everything again, publish the release, move the ledger, project, read back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import flow, task

from flows.orchestrator.notifications import notify
from flows.orchestrator.retries import REGISTRY_POLICY
from flows.workspace.desk import desk
from registry.ledger import Entry
from registry.promotion import Promotion


@task(name="promotion", **REGISTRY_POLICY)
def promotion(promoting: Promotion, version: str, told: Callable[[str], None]) -> Entry:
    """One repeatable sequence: a retry, like a second run, goes on where it stopped."""
    return promoting.promote(version, told=told)


@flow(name="promote", validate_parameters=False)
def promote(version: str, model: str | None = None, workspace: str = ".", quiet: bool = True) -> dict[str, Any]:
    """Promote an approved version; repeating it after any failure goes on where it stopped."""

    def told(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    found = desk(Path(workspace), model)
    entry = promotion(found.promotion, version, told)
    approver = next(e.actor.name for e in found.ledger.entries(found.model) if e.seq == entry.body["approved_seq"])
    facts = {"version": version, "by": entry.actor.name, "reason": f"approved by {approver}", "seq": entry.seq}
    notify(found.settings, "promoted", found.model, facts, told=told)
    return {"model": found.model, "version": version, "ledger_seq": entry.seq, "release": entry.body["release"]}
