"""Evidently: the statistics of single columns, the page that is kept when a window alarms, and the history in its workspace.

The only module that knows Evidently's API. Which statistic is computed is always named, never chosen by Evidently: a
default that depends on the number of rows cannot have a threshold.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.contracts.errors import MonitoringError
from components.images import STATISTICS
from components.store import write_atomically
from monitoring.verdicts import Sample

if TYPE_CHECKING:
    import pandas as pd

_NAMESPACE = uuid.UUID("6f0b1c1e-7a53-4f0e-9a0e-6d1c5d2c7b11")


class Measured:
    """What Evidently found for one window: a value a column, and the report behind it."""

    def __init__(self, values: Mapping[str, float], snapshot: Any) -> None:
        self.values = values
        self._snapshot = snapshot

    def save_page(self, path: Path) -> None:
        """Evidently's HTML page, whole or not at all."""
        with _quiet():
            text: str = self._snapshot.get_html_str(as_iframe=False)
        write_atomically(path, text.encode())

    def keep(self, workspace: Path, model: str, window_id: str, tags: list[str]) -> None:
        """Put the report into Evidently's workspace; the same window replaces itself."""
        with _quiet():
            from evidently.ui.workspace import ProjectModel, Workspace

            opened = Workspace.create(str(workspace))
            project_id = uuid.uuid5(_NAMESPACE, model)
            if opened.get_project(project_id) is None:
                opened.add_project(ProjectModel(id=project_id, name=model, description="Drift of what the champion sees"))
                _add_panels(opened.get_project(project_id))
            snapshot = self._snapshot.to_snapshot_model()
            snapshot.tags = tags
            opened.state.write_snapshot(project_id, uuid.uuid5(_NAMESPACE, f"{model}/{window_id}"), snapshot)


def forget(workspace: Path, model: str, window_id: str) -> None:
    """Remove a window's report from Evidently's workspace."""
    project, snapshot = uuid.uuid5(_NAMESPACE, model), uuid.uuid5(_NAMESPACE, f"{model}/{window_id}")
    (workspace / str(project) / "snapshots" / f"{snapshot}.json").unlink(missing_ok=True)


def _add_panels(project: Any) -> None:
    from evidently.sdk.models import PanelMetric
    from evidently.sdk.panels import line_plot_panel

    for title, columns in (
        ("Look of the pictures: Wasserstein distance in standard deviations", STATISTICS),
        ("Confidence and predicted classes", ("confidence", "predicted")),
    ):
        values = [
            PanelMetric(metric="ValueDrift", metric_labels={"column": column}, legend=column, view_params={})
            for column in columns
        ]
        project.dashboard.add_panel(line_plot_panel(title=title, values=values))


def measure(reference: Sample, window: Sample, methods: Mapping[str, str], *, name: str, at: datetime.datetime) -> Measured:
    """One value a column of `methods` (column to Evidently's name of a statistic); raises MonitoringError."""
    with _quiet():
        from evidently import DataDefinition, Dataset, Report
        from evidently.metrics import ValueDrift
    frames = [_frame(sample, list(methods)) for sample in (reference, window)]
    categorical = [column for column in methods if frames[0][column].dtype.kind not in "biuf"]
    numerical = [column for column in methods if column not in categorical]
    definition = DataDefinition(numerical_columns=numerical, categorical_columns=categorical)
    with _quiet():
        ours, theirs = (Dataset.from_pandas(frame, data_definition=definition) for frame in frames)
        report = Report([ValueDrift(column=column, method=method) for column, method in methods.items()])
        snapshot = report.run(theirs, ours, timestamp=at, name=name)
        told = snapshot.dict()["metrics"]
    values = {metric["config"]["column"]: float(metric["value"]) for metric in told}
    missing = sorted(set(methods) - set(values))
    if missing:
        raise MonitoringError(f"Evidently gave no value for {', '.join(missing)}; nothing is known about this window")
    return Measured(values, snapshot)


def _frame(sample: Sample, columns: list[str]) -> pd.DataFrame:
    import pandas as pd

    known = {name: sample.statistics[:, index] for index, name in enumerate(STATISTICS)} | dict(sample.columns)
    unknown = sorted(set(columns) - set(known))
    if unknown:
        raise MonitoringError(f"a detector looks at {unknown[0]!r}, which is not there; there are {', '.join(known)}")
    # Text as objects of Python, so that Evidently takes it for categories whatever it looks like.
    chosen = {name: known[name] for name in columns}
    return pd.DataFrame({name: found if found.dtype.kind in "biuf" else found.tolist() for name, found in chosen.items()})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Evidently and what it imports warn about each other; none of it is about the data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("evidently").setLevel(logging.ERROR)
        yield
