"""Live curves: training metrics into an MLflow run, from a thread that training never waits for.

MLflow may be slow to start, or down: rows are kept and sent when it answers. Whatever is still missing at the end is
written by registration, which has the whole history, so nothing is lost either way.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRAINING_TAG = "visionloop.training"


def client(tracking_uri: str) -> MlflowClient:
    """An MLflow client; importing MLflow takes seconds, so nothing imports it before it is needed."""
    import mlflow
    from mlflow import MlflowClient

    # A client resolves models:/ addresses through the process-wide setting, whatever it was given itself.
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)
    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def experiment_id(mlflow: MlflowClient, model: str, artifacts: Path | None) -> str:
    """The experiment named after the model; `artifacts` is its folder where no server decides."""
    found = mlflow.get_experiment_by_name(model)
    if found is not None:
        return str(found.experiment_id)
    location = (artifacts / model).resolve().as_uri() if artifacts is not None else None
    return str(mlflow.create_experiment(model, artifact_location=location))


def run_of_training(mlflow: MlflowClient, experiment: str, training_key: str, tags: Mapping[str, str]) -> str:
    """The MLflow run of one training, made once: a resumed or repeated run finds it again."""
    found = mlflow.search_runs([experiment], f"tags.`{TRAINING_TAG}` = '{training_key}'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    created = mlflow.create_run(experiment, run_name=tags.get("visionloop.run"), tags={TRAINING_TAG: training_key, **tags})
    return str(created.info.run_id)


def log_history(mlflow: MlflowClient, run_id: str, history: list[dict[str, float]]) -> None:
    """Write the epochs that the run does not hold yet."""
    from mlflow.entities import Metric

    known = {m.step for m in mlflow.get_metric_history(run_id, "training.valid_loss")}
    metrics = [
        Metric(f"training.{name}", value, 0, int(row["epoch"]))
        for row in history
        if int(row["epoch"]) not in known
        for name, value in row.items()
        if name != "epoch"
    ]
    for start in range(0, len(metrics), 900):
        mlflow.log_batch(run_id, metrics=metrics[start : start + 900])


class LiveMetrics:
    """A MetricSink that sends from a thread; every failure is remembered and none is raised."""

    def __init__(
        self, tracking_uri: str, model: str, training_key: str, *, artifacts: Path | None, tags: Mapping[str, str]
    ) -> None:
        self._rows: queue.SimpleQueue[dict[str, float] | None] = queue.SimpleQueue()
        self.problem: str | None = None
        self._arguments = (tracking_uri, model, training_key, artifacts, dict(tags))
        self._thread = threading.Thread(target=self._send, name="mlflow-live", daemon=True)
        self._thread.start()

    def log(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self._rows.put({**metrics, "epoch": float(epoch)})

    def close(self, timeout_s: float = 30.0) -> None:
        """Send what is queued, waiting at most `timeout_s`."""
        self._rows.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.problem = self.problem or f"MLflow did not answer within {timeout_s:g} s"

    def _send(self) -> None:
        tracking_uri, model, training_key, artifacts, tags = self._arguments
        mlflow: Any = None
        run_id = ""
        pending: list[dict[str, float]] = []
        while (row := self._rows.get()) is not None:
            pending.append(row)
            try:
                if mlflow is None:
                    mlflow = client(tracking_uri)
                    run_id = run_of_training(mlflow, experiment_id(mlflow, model, artifacts), training_key, tags)
                log_history(mlflow, run_id, pending)
                pending, self.problem = [], None
            except Exception as error:
                # Live curves are a convenience: registration writes the same rows and is where MLflow has to be there.
                self.problem, mlflow = f"{type(error).__name__}: {str(error)[:200]}", None
