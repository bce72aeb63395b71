"""Asking the governor before a training that no person started, and keeping it told while the training runs."""

from __future__ import annotations

import datetime
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from components import dataversions
from components.contracts import ConfigError, RegistryUnavailable, WorkspaceBusy
from flows.config import load_recipe
from flows.looping import Loop
from flows.notifications import notify
from flows.run import Workspace, run_id
from flows.settings import read_settings
from monitoring.governor import Decision, Governor, Request
from monitoring.outbox import Alarm

Cause = Literal["manual", "drift", "schedule"]


@dataclass
class Permit:
    """The governor's answer, and what became of the run it granted."""

    granted: bool
    told: dict[str, Any] = field(default_factory=dict)
    """What a refused flow returns."""
    summary: dict[str, Any] = field(default_factory=dict)
    """What the training came to; filled by the flow."""


@contextmanager
def governed(recipe: str, folder: Path, cause: Cause, key: str) -> Iterator[Permit]:
    """Whether this training may run. A person's own needs no permit; others hold a lease for as long as they run.

    `key` is the id of the alarm, or the scheduled run that is taken up again.
    Raises ConfigError for a cause that does not exist or an alarm that nobody raised, RegistryUnavailable when the governor
    cannot be asked: then nothing runs.
    """
    if cause == "manual":
        yield Permit(True)
        return
    if cause not in ("drift", "schedule"):
        raise ConfigError(f"unknown cause {cause!r}; valid: drift, manual, schedule")
    workspace = Workspace.find(folder)
    model = load_recipe(recipe, workspace=workspace.root).model
    loop = Loop(workspace, read_settings(workspace.state), model)
    raised = loop.outbox.alarm(key) if cause == "drift" else None
    if raised is not None and raised.model != model:
        raise ConfigError(f"alarm {key!r} is about model {raised.model!r}, this deployment trains {model!r}")
    if cause == "schedule" and key and key not in {run.key for run in loop.governor.runs(model)}:
        raise ConfigError(f"no scheduled run {key!r} was granted; leave `request` empty for a new one")
    holder = uuid.uuid4().hex
    request = _request(loop, recipe, cause, raised, key)
    decision = loop.governor.ask(request, holder=holder)
    if decision.answer != "granted":
        _tell(loop, request, decision)
        yield Permit(False, told=_refusal(loop, request, decision))
        return
    permit = Permit(True)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(loop.governor, request.key, holder, stop), daemon=True)
    beat.start()
    try:
        yield permit
    except WorkspaceBusy:
        # A person trains by hand, or adds data: not this run's fault, it is taken up again.
        loop.governor.give_back(request.key, holder, begun=False)
        raise
    except Exception as error:
        loop.governor.end(request.key, holder, "failed", {"problem": f"{type(error).__name__}: {error}"[:500]})
        raise
    except BaseException:
        loop.governor.give_back(request.key, holder)  # cancelled or stopped
        raise
    else:
        summary = permit.summary
        facts = {"version": summary.get("version"), "run": summary.get("run"), "verdict": summary.get("verdict")}
        loop.governor.end(request.key, holder, summary["outcome"], facts)
    finally:
        stop.set()
        beat.join(5)


def _request(loop: Loop, recipe: str, cause: Literal["drift", "schedule"], raised: Alarm | None, key: str) -> Request:
    from registry.ledger import Ledger

    config = load_recipe(recipe, workspace=loop.workspace.root)
    data = dataversions.pinned(loop.workspace.root)
    judged = [
        entry
        for entry in Ledger(loop.settings.ledger_url).entries(loop.model)
        if entry.kind in ("requested", "rejected") and (entry.body.get("summary") or {}).get("run")
    ]
    latest = judged[-1].body["summary"] if judged else None
    today = datetime.datetime.now(datetime.UTC)
    return Request(
        key=key or f"schedule:{loop.model}:{today:%Y-%m-%dT%H%M}:{uuid.uuid4().hex[:6]}",
        model=loop.model,
        cause=cause,
        data_version=data.dvc_hash,
        trained_on=latest["data_version"] if latest else None,
        changed=latest is None or latest["run"] != run_id(loop.workspace, config, data, loop.settings),
        diagnosis=raised.diagnosis if raised is not None else "none",
        detectors=raised.detectors if raised is not None else (),
        champion=raised.version if raised is not None else "",
    )


def _beat(governor: Governor, key: str, holder: str, stop: threading.Event) -> None:
    while not stop.wait(governor.policy.lease_s / 4):
        try:
            if not governor.renew(key, holder):
                return
        except RegistryUnavailable:
            continue  # the database is away: the lease may end, the training does not


def _refusal(loop: Loop, request: Request, decision: Decision) -> dict[str, Any]:
    return {
        "outcome": "queued" if decision.answer == "queued" else "refused",
        "model": request.model,
        "key": request.key,
        "rule": decision.rule,
        "reason": decision.reason,
        "decision": decision.seq,
        "to_label": _list_of(loop, request) if decision.rule == "no new data" else None,
    }


def _list_of(loop: Loop, request: Request) -> str | None:
    from flows.watching import TO_LABEL

    path = loop.folder / request.key.rsplit(":", 1)[-1] / TO_LABEL
    return str(path) if path.is_file() else None


def _tell(loop: Loop, request: Request, decision: Decision) -> None:
    if decision.answer == "refused" and decision.rule != "duplicate":
        found = _list_of(loop, request) if decision.rule == "no new data" else None
        facts = {"by": decision.rule, "reason": decision.reason + (f" [{found}]" if found else "")}
        notify(loop.settings, "refused", request.model, facts)
