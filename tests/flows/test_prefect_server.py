"""The locked versions of Prefect's server and its libraries work together: uv cannot tell, only running can."""

from __future__ import annotations

import time
from typing import Any

import pytest


def test_a_run_is_recorded_with_its_stages(trained: Any, prefect_server: str) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs()
        names = {task.name.rsplit("-", 1)[0] for task in client.read_task_runs()}
    assert any(run.state_name == "Completed" for run in runs)
    assert {"validation", "splitting", "training", "export", "evaluation", "gating", "registration"} <= names


def test_a_scheduled_run_appears(prefect_server: str) -> None:
    """With SQLAlchemy 2.1 the scheduler of this Prefect fails on every tick, and health stays green."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule

    from flows.train import train

    with get_client(sync_client=True) as client:
        flow_id = client.create_flow(train)
        deployment = client.create_deployment(
            flow_id,
            name="nightly",
            schedules=[DeploymentScheduleCreate(schedule=CronSchedule(cron="0 3 * * *"), active=True)],
        )
        deadline = time.monotonic() + 60
        while True:
            runs = [run for run in client.read_flow_runs() if run.deployment_id == deployment]
            if runs:
                break
            if time.monotonic() > deadline:
                pytest.fail("the scheduler made no run within 60 s")
            time.sleep(0.5)
        client.delete_deployment(deployment)
    assert runs[0].state_name == "Scheduled"
