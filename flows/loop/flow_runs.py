"""Training runs on the Prefect server: started without an event, and what it recorded of each.

That is the event, the automation that it woke, and who made the run.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.loop.loop import Loop

DEPLOYMENT = "train"
TIMEOUT_S = 30.0
_NEAR = datetime.timedelta(minutes=10)
"""An automation acts within moments of its event."""


def training_runs(loop: Loop, *, request: str | None = None) -> list[dict[str, Any]]:
    """The latest 200 runs of the model's training deployment in order of time, of one alarm or all, and who made them."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(f"{DEPLOYMENT}/{loop.model}")
        runs = client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id])),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=200,
        )
    found = []
    for run in reversed(runs):
        if request is not None and run.parameters.get("request") != request:
            continue
        by = run.created_by
        found.append(
            {
                "flow_run": str(run.id),
                "name": run.name,
                "state": run.state_name,
                "final": bool(run.state is not None and run.state.is_final()),
                "message": run.state.message if run.state is not None else None,
                "cause": run.parameters.get("cause"),
                "request": run.parameters.get("request"),
                "reason": run.parameters.get("reason"),
                "created": run.created.isoformat() if run.created else None,
                "started": run.start_time.isoformat() if run.start_time else None,
                "ended": run.end_time.isoformat() if run.end_time else None,
                "created_by": {"type": by.type, "name": by.display_value} if by is not None else None,
                "tags": list(run.tags),
            }
        )
    return found


def events(loop: Loop, prefix: list[str], *, around: str | None = None) -> list[dict[str, Any]]:
    """At most 50 events that the server kept, oldest first, of the minutes around a moment or the latest ones.

    Empty when the server does not answer.
    """
    if not loop.settings.prefect_api_url:
        return []
    from prefect.client.orchestration import get_client

    wanted: dict[str, Any] = {"event": {"prefix": prefix}, "order": "DESC"}
    if around is not None:
        moment = datetime.datetime.fromisoformat(around)
        wanted["occurred"] = {"since": (moment - _NEAR).isoformat(), "until": (moment + _NEAR).isoformat()}
    try:
        with get_client(sync_client=True) as client:
            answer = client.request("POST", "/events/filter", json={"filter": wanted, "limit": 50})
            answer.raise_for_status()
            found: list[dict[str, Any]] = answer.json().get("events", [])
    except Exception:
        # httpx and Prefect raise many things for a server that is away; what is not known is not made up.
        return []
    return found[::-1]


def trail(loop: Loop, request: str, *, wait_s: float = 0.0) -> list[dict[str, Any]]:
    """For each training run of an alarm: the event and the automation that Prefect names as its cause.

    A run that no automation made has no event. Events reach the records a moment after their effect: `wait_s`.
    """
    deadline = time.monotonic() + wait_s
    while True:
        found = [run | _cause_of(run, loop) for run in training_runs(loop, request=request)]
        made = [run for run in found if (run["created_by"] or {}).get("type") == "AUTOMATION"]
        if all(run["event"] for run in made) or time.monotonic() >= deadline:
            return found
        time.sleep(0.5)


def _cause_of(run: dict[str, Any], loop: Loop) -> dict[str, Any]:
    """The automation whose executed action names this run, and the event that woke it."""
    flow_run, seen = run["flow_run"], events(loop, ["visionloop.", "prefect.automation.action."], around=run["created"])
    by_id = {event["id"]: event for event in seen}
    for event in seen:
        if event["event"] != "prefect.automation.action.executed":
            continue
        related = {item["prefect.resource.id"] for item in event.get("related", [])}
        if f"prefect.flow-run.{flow_run}" not in related:
            continue
        names = [event["resource"], *event.get("related", [])]
        automation: dict[str, str] = next(
            (n for n in names if n["prefect.resource.id"].startswith("prefect.automation.")), {}
        )
        # The executed action names the triggering event among what is related, or its triggered action does.
        woken = next(
            (by_id[i] for i in _event_ids(event) if i in by_id and by_id[i]["event"].startswith("visionloop.")), None
        )
        if woken is None:
            woken = _woken_before(event, seen)
        return {
            "automation": automation.get("prefect.resource.name"),
            "event": woken["event"] if woken else None,
            "event_id": woken["id"] if woken else None,
            "event_at": woken["occurred"] if woken else None,
            "event_alarm": (woken or {}).get("payload", {}).get("alarm"),
        }
    return {"automation": None, "event": None, "event_id": None, "event_at": None, "event_alarm": None}


def _event_ids(event: dict[str, Any]) -> list[str]:
    related = [item["prefect.resource.id"].rpartition("prefect.event.")[2] for item in event.get("related", [])]
    return [event.get("follows") or "", *related]


def _woken_before(executed: dict[str, Any], seen: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Through the action's triggered event, which follows the one that woke the automation."""
    by_id = {event["id"]: event for event in seen}
    triggered = by_id.get(executed.get("follows") or "")
    if triggered is None:
        return None
    return next(
        (by_id[i] for i in _event_ids(triggered) if i in by_id and by_id[i]["event"].startswith("visionloop.")), None
    )


@dataclass(frozen=True)
class Started:
    """A run of the training deployment that was started without an event."""

    key: str
    flow_run_id: str
    cause: str


def start(loop: Loop, key: str) -> Started | None:
    """Start the training deployment for a key; None when a run of it is under way already.

    The same key in the same state is one run, however often and by however many it is asked.
    """
    from prefect.client.orchestration import get_client

    cause = "drift" if key.startswith("drift:") else "schedule"
    asked = [row for row in loop.governor.history(loop.model) if row["key"] == key]
    made = training_runs(loop, request=key)
    if any(not run["final"] and "visionloop-sweep" in run["tags"] for run in made):
        return None
    # A run that ended without asking the governor, with its worker for instance, does not stand for the next one.
    state = f"{asked[-1]['seq'] if asked else 0}:{sum(run['final'] for run in made)}"
    parameters: Mapping[str, Any] = training_parameters(loop) | {
        "cause": cause,
        "request": key,
        "reason": f"{key}, started by the sweep",
    }
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(f"{DEPLOYMENT}/{loop.model}")
        run = client.create_flow_run_from_deployment(
            deployment.id,
            parameters=dict(parameters),
            idempotency_key=f"visionloop:{key}:{state}",
            tags=["visionloop-sweep"],
        )
    return Started(key, str(run.id), cause)


def training_parameters(loop: Loop) -> dict[str, Any]:
    """What every run of the model's training deployment is given."""
    return {"recipe": loop.recipe, "workspace": str(loop.workspace.root), "quiet": True}
