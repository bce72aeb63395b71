"""The map of a promotion: an approved candidate goes live."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from components.contracts import RegistryUnavailable
from flows.deciding import desk
from flows.notifications import notify
from registry.ledger import Entry
from registry.promotion import Checked, Promotion


def _transient(_task: Any, _run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), RegistryUnavailable)


_POLICY: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "retries": 2,
    "retry_delay_seconds": [1, 3],
    "retry_condition_fn": _transient,
}


@task(name="check", **_POLICY)
def check(promotion: Promotion, version: str) -> Checked | Entry:
    """Rules, every byte, every digest; the release is published. A version that reigns already is the answer."""
    return promotion.reigning(version) or promotion.check(version)


@task(name="move", **_POLICY)
def move(promotion: Promotion, checked: Checked | Entry) -> Entry:
    """The ledger row that makes it champion, unless anything changed since the check."""
    return checked if isinstance(checked, Entry) else promotion.move(checked)


@task(name="project", **_POLICY)
def project(promotion: Promotion) -> None:
    """What servers and MLflow read follows the ledger, and is read back."""
    promotion.project()
    promotion.read_back()


@flow(name="promote", validate_parameters=False)
def promote(version: str, model: str | None = None, workspace: str = ".", quiet: bool = True) -> dict[str, Any]:
    """Promote an approved version; repeating it after any failure goes on where it stopped."""

    def told(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    found = desk(Path(workspace), model)
    promotion = found.promotion
    checked = check(promotion, version)
    entry = move(promotion, checked)
    told(f"version {version} is champion of {found.model} (ledger row {entry.seq})")
    project(promotion)
    told("routes, MLflow's alias and the published release were read back")
    approver = next(e.actor.name for e in promotion.ledger.entries(found.model) if e.seq == entry.body["approved_seq"])
    facts = {"version": version, "by": entry.actor.name, "reason": f"approved by {approver}", "seq": entry.seq}
    notify(found.settings, "promoted", found.model, facts, told=told)
    return {"model": found.model, "version": version, "ledger_seq": entry.seq, "release": entry.body["release"]}
