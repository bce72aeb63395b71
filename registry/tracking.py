"""Live curves: training metrics into an MLflow run, from a thread that training never waits for.

MLflow may be slow to start, or down: rows are kept and sent when it answers. Whatever is still missing at the end is
written by registration, which has the whole history, so nothing is lost either way.
"""

from __future__ import annotations

import contextlib
import json
import queue
import sqlite3
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from components.contracts.errors import RegistryUnavailable, redacted
from components.databases import sqlite_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRAINING_TAG = "visionloop.training"


_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("trace_tags", "value"),
)
"""Where MLflow's tables hold absolute locations of artefacts."""


def settle(tracking_uri: str, artifacts: Path | None) -> str:
    """Let the tables of a workspace that was moved or copied name the place where it is now; returns what to tell.

    MLflow keeps the absolute location of every artefact, so a copy would read from its original, write into it, or make it
    again. Tables that do not lie beside `artifacts` are somebody else's and stay as they are. Raises RegistryUnavailable
    when the tables name another place and cannot be written.
    """
    artifacts = artifacts.absolute() if artifacts is not None else None
    database = sqlite_file(tracking_uri)
    if artifacts is None or database is None or not database.is_file():
        return ""
    if database.resolve().parent != artifacts.parent.resolve():
        return ""
    places: list[tuple[Path, Path]] = []
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=20, isolation_level=None)) as connection:
            places = _other_places(connection, artifacts)
            if not places:
                return ""
            connection.execute("BEGIN IMMEDIATE")
            # Asked again, now that nobody else can write: of two that settle at once, the second finds nothing to do.
            places = _other_places(connection, artifacts)
            count = sum(_rename(connection, old, new) for old, new in places)
            connection.execute("COMMIT")
    except sqlite3.Error as error:
        where = f"they name {places[0][0]}, where it was made or copied from; " if places else ""
        raise RegistryUnavailable(
            f"MLflow's tables of this workspace, {database}, cannot be made to name this place: {where}{error}. No other "
            f"place was read or written; make the file and its folder writable, and run the same command again"
        ) from error
    if not count:
        return ""
    old, new = places[0]
    return f"this workspace lay in {old} before; MLflow's tables name {new} now ({count} locations)"


def _other_places(connection: sqlite3.Connection, artifacts: Path) -> list[tuple[Path, Path]]:
    """Folders that the experiments' locations name in place of a folder of this workspace, the longest first."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone():
        return []
    found = set()
    for name, location in connection.execute(
        "SELECT name, artifact_location FROM experiments WHERE artifact_location != ''"
    ):
        folder = folder_of(location)
        if (
            folder is None
            or (folder.parent.name, folder.name) != (artifacts.name, name)
            or _is_one(folder.parent, artifacts)
        ):
            continue
        old, new = folder.parent, artifacts
        # As much as both have in common moved with it: MLflow's own default folder lies beside the workspace's state.
        for _ in range(2):
            if old.name == new.name and old.name:
                old, new = old.parent, new.parent
        found.add((old, new))
    return sorted(found, key=lambda pair: len(str(pair[0])), reverse=True)


def _is_one(one: Path, other: Path) -> bool:
    """Whether two paths are one folder: a mount or a link is no copy."""
    try:
        return one == other or one.samefile(other)
    except OSError:
        return False


def _rename(connection: sqlite3.Connection, old: Path, new: Path) -> int:
    count = 0
    there = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    for before, after in ((f"{old.as_uri()}/", f"{new.as_uri()}/"), (f"{old}/", f"{new}/")):
        for table, column in _LOCATIONS:
            if table in there:
                count += connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608 (names of ours)
                    f"WHERE substr({column}, 1, ?) = ? AND substr({column}, 1, ?) != ?",
                    (after, len(before) + 1, len(before), before, len(after), after),
                ).rowcount
    return count


def folder_of(location: str) -> Path | None:
    """The folder that an artefact location names on this machine; None for one that is kept elsewhere."""
    parts = urlsplit(location)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    return Path(location) if location.startswith("/") else None


def client(tracking_uri: str, artifacts: Path | None = None) -> MlflowClient:
    """An MLflow client; importing MLflow takes seconds, so nothing imports it before it is needed."""
    settle(tracking_uri, artifacts)
    import mlflow
    from mlflow import MlflowClient

    # A client resolves models:/ addresses through the process-wide setting, whatever it was given itself.
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)
    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def experiment_id(mlflow: MlflowClient, model: str, artifacts: Path | None) -> str:
    """The experiment named after the model; `artifacts` is its folder where no server decides."""
    found = mlflow.get_experiment_by_name(model)
    if found is not None and found.lifecycle_stage == "deleted":
        raise RegistryUnavailable(
            f"MLflow's experiment {model!r} was deleted, and only a person should undo that; its runs are still there. "
            f"Restore it and run the same command again: mlflow experiments restore --experiment-id {found.experiment_id} "
            f"(with MLFLOW_TRACKING_URI={redacted(mlflow.tracking_uri)})"
        )
    if found is not None:
        return str(found.experiment_id)
    location = (artifacts / model).absolute().as_uri() if artifacts is not None else None
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

    known = {m.step for m in mlflow.get_metric_history(run_id, "training.train_loss")}
    metrics = [
        Metric(f"training.{name}", value, 0, int(row["epoch"]))
        for row in history
        if int(row["epoch"]) not in known
        for name, value in row.items()
        if name != "epoch"
    ]
    for start in range(0, len(metrics), 900):
        mlflow.log_batch(run_id, metrics=metrics[start : start + 900])


@dataclass(frozen=True)
class DataInput:
    """One split of the data that a run used, as MLflow lists it among the run's inputs."""

    split: str
    digest: str
    """Of its images and their labels; MLflow keeps 36 characters."""
    class_counts: Mapping[str, int]
    source: Mapping[str, str]
    """Where it comes from: data version, git commit."""


def log_inputs(mlflow: MlflowClient, run_id: str, inputs: Sequence[DataInput]) -> None:
    """Name the splits as the run's data sets, each with its context; naming them again changes nothing. No image is read."""
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.entities import Dataset, DatasetInput, InputTag

    found = []
    for one in inputs:
        counts = {"num_rows": sum(one.class_counts.values()), "class_counts": dict(one.class_counts)}
        dataset = Dataset(
            name="data",
            digest=one.digest[:36],
            source_type="code",
            source=CodeDatasetSource(dict(one.source)).to_json(),
            profile=json.dumps(counts, ensure_ascii=False),
        )
        found.append(DatasetInput(dataset=dataset, tags=[InputTag("mlflow.data.context", one.split)]))
    mlflow.log_inputs(run_id, datasets=found)


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
                    mlflow = client(tracking_uri, artifacts)
                    run_id = run_of_training(mlflow, experiment_id(mlflow, model, artifacts), training_key, tags)
                log_history(mlflow, run_id, pending)
                pending, self.problem = [], None
            except Exception as error:
                # Live curves are a convenience: registration writes the same rows and is where MLflow has to be there.
                self.problem, mlflow = f"{type(error).__name__}: {str(error)[:200]}", None
