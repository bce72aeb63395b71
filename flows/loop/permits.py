"""Asking the governor before a training that no person started, and keeping it told while the training runs."""

from __future__ import annotations

import datetime
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from components import dataversions
from components.contracts.errors import ConfigError, DataDiffers, RegistryUnavailable, StoreError, WorkspaceBusy
from flows.loop.loop import Loop
from flows.orchestrator.notifications import notify
from flows.training.chosen import ChosenRecipe
from flows.training.run import run_id
from flows.workspace.recipes import RunConfig
from flows.workspace.settings import read_settings
from monitoring.governor import Decision, Governor, Request
from monitoring.outbox import Alarm

if TYPE_CHECKING:
    from registry.ledger import Entry

Cause = Literal["manual", "drift", "schedule"]
_NIGHT = datetime.timedelta(hours=23)
"""A scheduled training that is later than this is the next night's."""


@dataclass
class Permit:
    """The governor's answer, and what became of the run it granted."""

    granted: bool
    told: dict[str, Any] = field(default_factory=dict)
    """What a refused flow returns."""
    summary: dict[str, Any] = field(default_factory=dict)
    """What the training came to; filled by the flow."""


@contextmanager
def governed(recipe: ChosenRecipe, cause: Cause, key: str) -> Iterator[Permit]:
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
    model = recipe.config.model
    loop = Loop(recipe.workspace, read_settings(recipe.workspace.state), model)
    raised = loop.outbox.alarm(key) if cause == "drift" else None
    if raised is not None and raised.model != model:
        raise ConfigError(f"alarm {key!r} is about model {raised.model!r}, this deployment trains {model!r}")
    if cause == "schedule" and key and not loop.governor.asked(key, model, cause):
        raise ConfigError(f"no scheduled run {key!r} was ever asked for; leave `request` empty for a new one")
    holder = uuid.uuid4().hex
    request = _request(loop, recipe.config, cause, raised, key)
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
    except (RegistryUnavailable, StoreError, DataDiffers, OSError):
        # The world's fault, not the model's: taken up again, as often as a killed run is.
        loop.governor.give_back(request.key, holder)
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
        # What gates did not decide helps production no more than what they rejected.
        loop.governor.end(request.key, holder, "candidate" if summary["outcome"] == "candidate" else "rejection", facts)
    finally:
        stop.set()
        beat.join(5)


def _request(loop: Loop, config: RunConfig, cause: Literal["drift", "schedule"], raised: Alarm | None, key: str) -> Request:
    from registry import approval

    data = dataversions.pinned(loop.workspace.root)
    entries = loop.ledger.entries(loop.model)
    judged = [
        entry
        for entry in entries
        if entry.kind in ("requested", "rejected") and (entry.body.get("summary") or {}).get("run")
    ]
    latest = judged[-1].body["summary"] if judged else None
    current_champion = approval.champion(entries)
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
        seen_by=raised.version if raised is not None else "",
        champion=str(current_champion.body["version"]) if current_champion is not None else "",
        failed_versions=_failed(entries),
        overdue=overdue(_NIGHT) if cause == "schedule" and not key else "",
    )


def _failed(entries: Sequence[Entry]) -> frozenset[str]:
    """Versions that a person rejected, or went back from."""
    rejected = {str(e.body["version"]) for e in entries if e.kind == "rejected" and "version" in e.body}
    left = {str(e.body["previous"]["version"]) for e in entries if e.kind == "rolled_back" and e.body.get("previous")}
    return frozenset(rejected | left)


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
    from flows.loop.windows import TO_LABEL

    window = request.key.rsplit(":", 1)[-1]
    try:
        return loop.window_store.place(window, TO_LABEL) if loop.window_store.has(window, TO_LABEL) else None
    except RegistryUnavailable:
        return None  # an answer of the governor does not wait for what would only go with it


def _tell(loop: Loop, request: Request, decision: Decision) -> None:
    # Nobody would act upon the others: another run stands for it, or there is nothing to do tonight.
    if decision.answer == "refused" and decision.rule not in ("duplicate", "overdue", "nothing changed"):
        found = _list_of(loop, request) if decision.rule == "no new data" else None
        facts = {"by": decision.rule, "reason": decision.reason + (f" [{found}]" if found else "")}
        notify(loop.settings, "refused", request.model, facts)


def overdue(limit: datetime.timedelta) -> str:
    """Why a scheduled run comes too late to be worth anything, when the next one stands for it; empty when it does not."""
    from prefect import runtime

    planned = runtime.flow_run.scheduled_start_time
    if runtime.flow_run.id is None or planned is None:
        return ""
    late = datetime.datetime.now(datetime.UTC) - planned
    return f"it was planned for {planned:%Y-%m-%d %H:%M} UTC, and a later one stands for it" if late >= limit else ""
