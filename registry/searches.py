"""Searches in MLflow: a run for the study and, nested in it, one for each trial that ended. Written twice they are one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from registry.tracking import client, experiment_id, log_history

if TYPE_CHECKING:
    from mlflow import MlflowClient

STUDY_TAG, TRIAL_TAG, _PARENT = "visionloop.study", "visionloop.trial", "mlflow.parentRunId"
_STATUS = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
"""MLflow's word for what came of a trial."""
_PAGE = 1000


@dataclass(frozen=True)
class TrialRun:
    """A trial that ended, as MLflow lists it."""

    number: int
    state: str
    params: Mapping[str, str]
    metrics: Mapping[str, float] = field(default_factory=dict)
    history: Sequence[dict[str, float]] = ()
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyRun:
    """A search, as MLflow lists it."""

    model: str
    name: str
    key: str
    """Names the study and all that its trials share."""
    params: Mapping[str, str]
    tags: Mapping[str, str] = field(default_factory=dict)


def record(tracking_uri: str, artifacts: Path | None, study: StudyRun, trials: Sequence[TrialRun], *, done: bool) -> None:
    """Write what MLflow does not hold yet; `done` where the search has come to its end. Raises what MLflow raises."""
    mlflow = client(tracking_uri, artifacts)
    experiment = experiment_id(mlflow, study.model, artifacts)
    parent = _parent(mlflow, experiment, study)
    known = _children(mlflow, experiment, parent)
    for trial in trials:
        run_id, status = known.get(str(trial.number), ("", ""))
        if status != _STATUS[trial.state]:
            _write(mlflow, experiment, parent, study, trial, run_id)
    for key, value in study.tags.items():
        mlflow.set_tag(parent, key, value)
    mlflow.update_run(parent, status="FINISHED" if done else "RUNNING")


def _parent(mlflow: MlflowClient, experiment: str, study: StudyRun) -> str:
    found = mlflow.search_runs([experiment], f"tags.`{STUDY_TAG}` = '{study.key}'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    run = mlflow.create_run(experiment, run_name=f"study {study.name}", tags={STUDY_TAG: study.key})
    _log_params(mlflow, run.info.run_id, study.params)
    return str(run.info.run_id)


def _children(mlflow: MlflowClient, experiment: str, parent: str) -> dict[str, tuple[str, str]]:
    """Run and status of each trial that is there, by its number."""
    found: dict[str, tuple[str, str]] = {}
    token = None
    while True:
        page = mlflow.search_runs([experiment], f"tags.`{_PARENT}` = '{parent}'", max_results=_PAGE, page_token=token)
        found |= {run.data.tags.get(TRIAL_TAG, ""): (run.info.run_id, run.info.status) for run in page}
        token = page.token
        if not token:
            return found


def _write(mlflow: MlflowClient, experiment: str, parent: str, study: StudyRun, trial: TrialRun, run_id: str) -> None:
    """A trial whole; its status comes last, so that one that was cut short is written again."""
    from mlflow.entities import Metric

    if not run_id:
        tags = {_PARENT: parent, TRIAL_TAG: str(trial.number), **trial.tags}
        run_id = mlflow.create_run(experiment, run_name=f"{study.name} {trial.number}", tags=tags).info.run_id
    _log_params(mlflow, run_id, trial.params)
    log_history(mlflow, run_id, list(trial.history))
    mlflow.log_batch(run_id, metrics=[Metric(name, value, 0, 0) for name, value in trial.metrics.items()])
    mlflow.set_terminated(run_id, _STATUS[trial.state])


def _log_params(mlflow: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    mlflow.log_batch(run_id, params=[Param(key, value[:500]) for key, value in params.items()])
