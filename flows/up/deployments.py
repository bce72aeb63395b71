"""What the loop needs on a Prefect server: a work pool, deployments with schedules, automations. Idempotent.

| deployment     | started by                                    | what it does                                            |
|----------------|-----------------------------------------------|---------------------------------------------------------|
| train/MODEL    | the drift automation, the schedule, the sweep | asks the governor, then validates to registers           |
| watch/MODEL    | its schedule                                  | judges the windows that ended, raises alarms, sweeps     |
| promote/MODEL  | a person                                      | makes an approved version the champion                   |
"""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

from flows.loop.alarms import DATA, DRIFT
from flows.loop.flow_runs import DEPLOYMENT, training_parameters
from flows.loop.loop import Loop

POOL = "visionloop"
HEARTBEAT_S = 30
"""How often a flow run says that it lives; Prefect accepts no less."""


def deploy(loop: Loop) -> list[str]:
    """The deployments of one model; returns their names. Raises what Prefect's client raises.

    A schedule that a person paused in Prefect stays paused; one that the loop no longer has goes.
    """
    from prefect.client.orchestration import get_client
    from prefect.schedules import Cron, Interval
    from prefect.types.entrypoint import EntrypointType

    from flows.promote import promote
    from flows.train import train
    from flows.watch import watch

    config, model = loop.config, loop.model
    own: dict[str, Any] = {"workspace": str(loop.workspace.root), "quiet": True}
    nightly = (
        [
            Cron(
                config.nightly,
                timezone=config.timezone,
                slug="nightly",
                parameters={"cause": "schedule", "reason": "nightly"},
            )
        ]
        if config.nightly
        else []
    )
    every = Interval(
        datetime.timedelta(minutes=config.every_minutes),
        # A little after a window has ended: its last rows are in the log then. Counted from 1970, as windows are: from
        # another day, one whose length divides no day would be looked at long after its end.
        anchor_date=datetime.datetime(1970, 1, 1, 0, 0, 30, tzinfo=datetime.UTC),
        slug="every-window",
    )
    found = []
    planned: list[tuple[Any, str, dict[str, Any], list[Any]]] = [
        (train, DEPLOYMENT, training_parameters(loop), nightly),
        (watch, "watch", own | {"model": model}, [every]),
        (promote, "promote", own | {"model": model}, []),
    ]
    for flow, name, parameters, schedules in planned:
        there = _schedules(f"{name}/{model}")
        active = {schedule.slug: schedule.active for schedule in there}
        deployment = flow.to_deployment(
            name=model,
            parameters=parameters,
            schedules=[dataclasses.replace(one, active=active.get(one.slug, True)) for one in schedules],
            tags=["visionloop"],
            work_pool_name=POOL,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        made = deployment.apply()
        # Prefect takes an empty list of schedules for "as they are".
        with get_client(sync_client=True) as client:
            for schedule in there:
                if schedule.slug not in {one.slug for one in schedules}:
                    client.delete_deployment_schedule(made, schedule.id)
        found.append(f"{name}/{model}")
    return found


def _schedules(deployment: str) -> list[Any]:
    """The schedules that a deployment has on the server; none when it is not there yet."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            return list(client.read_deployment_by_name(deployment).schedules)
        except ObjectNotFound:
            return []


def make_pool() -> None:
    """The work pool of processes on this machine, once."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists

    with get_client(sync_client=True) as client:
        try:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        except ObjectAlreadyExists:
            return


def automate(loop: Loop) -> list[str]:
    """The automations of one model; a second call changes nothing, one that was made twice is made single."""
    from prefect.automations import Automation
    from prefect.client.orchestration import get_client
    from prefect.events.actions import RunDeployment
    from prefect.events.schemas.automations import EventTrigger, Posture

    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(f"{DEPLOYMENT}/{loop.model}").id

    def of_event(template: str) -> dict[str, str]:
        return {"__prefect_kind": "jinja", "template": template}

    drift = Automation(
        name=f"visionloop: drift retrains {loop.model}",
        description="Starts the training deployment; the governor decides whether it trains.",
        trigger=EventTrigger(
            posture=Posture.Reactive,
            expect={DRIFT, DATA},
            match={"prefect.resource.id": f"visionloop.model.{loop.model}"},
            threshold=1,
            within=datetime.timedelta(0),
        ),
        actions=[
            RunDeployment(
                source="selected",
                deployment_id=deployment,
                job_variables=None,
                parameters={
                    "cause": "drift",
                    "request": of_event("{{ event.payload.alarm }}"),
                    "reason": of_event("{{ event.payload.reason }}"),
                },
            )
        ],
    )
    return [_only_one(drift), _only_one(_crash_without_heartbeat())]


def _crash_without_heartbeat() -> Any:
    """A run that stopped saying that it lives is marked as crashed: its worker may be gone with it."""
    from prefect.automations import Automation
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import EventTrigger, Posture

    ended = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed", "Skipped")}
    return Automation(
        name="visionloop: runs without a heartbeat are crashed",
        description="The sweep takes a training up again once its lease is over.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *ended},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            threshold=1,
            within=datetime.timedelta(seconds=3 * HEARTBEAT_S),
        ),
        actions=[ChangeFlowRunState(name=None, state=StateType.CRASHED, message="no heartbeat for 90 s", force=False)],
    )


def _only_one(wanted: Any) -> str:
    """Create or update by name, and remove what has the name as well."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        there = sorted(client.read_automations_by_name(wanted.name), key=lambda found: str(found.id))
        for extra in there[1:]:
            client.delete_automation(extra.id)
    if there:
        wanted.id = there[0].id
        wanted.enabled = there[0].enabled  # a person may have switched it off
        wanted.update()
    else:
        wanted.create()
    return str(wanted.name)
