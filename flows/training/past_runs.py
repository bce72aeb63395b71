"""What was run in a workspace, told from the run folders alone: when, with what set, and what came of it."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from components.choosing import AUTO
from components.contracts.errors import StoreError
from components.contracts.verdicts import Evaluation, Verdict
from components.contracts.wording import shown_utc
from components.store import MANIFEST, unseal
from flows.terminal import figure
from flows.training.progress import running
from flows.training.results import estimate_json
from flows.training.run import stage_folder
from flows.workspace.workspace import Workspace


def past_runs(workspace: Workspace) -> list[dict[str, Any]]:
    """The runs, the first started first; what a folder does not tell, as older ones do not, is None.

    `progress` says how far one is that goes on now.
    """
    alive = {each.run: each.told() for each in running(workspace)}
    found = [_run(path) | {"progress": alive.get(path.parent.name)} for path in workspace.runs.glob("*/config.json")]
    return sorted(found, key=lambda run: (run["started"], run["run"]))


def _run(path: Path) -> dict[str, Any]:
    config, outcome = _read(path), _read(next(iter(path.parent.glob("*-registration/outcome.json")), None))
    # Folders of before this was recorded have the time of their file.
    started = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).isoformat(timespec="seconds")
    serving = (config.get("config") or {}).get("export", {}).get("serving")
    if serving == AUTO:
        serving = _chosen(path.parent)
    return {
        "run": path.parent.name,
        "started": config.get("started") or started,
        "outcome": _outcome(outcome),
        "version": outcome.get("version"),
        "engine": serving,
        "accuracy": _accuracy(path.parent, str(serving)),
        "set": config.get("set"),
        "folder": str(path.parent),
    }


def _outcome(told: dict[str, Any]) -> str:
    if not told:
        return "unfinished"
    return ("undecided" if "gates" in told else "candidate") if "version" in told else "rejection"


def _read(path: Path | None) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text()) if path is not None else {}
    except (OSError, ValueError):
        return {}  # a folder that was cut short is listed with what it tells
    return found if isinstance(found, dict) else {}


def _chosen(run: Path) -> str:
    """The engine that the choice fell on; `auto` as long as there was none."""
    try:
        body = unseal((run / stage_folder("gating") / MANIFEST).read_bytes())
        return (Verdict.read(body["record"]).serving_engine if body is not None else "") or AUTO
    except (OSError, StoreError, KeyError, TypeError):
        return AUTO


def _accuracy(run: Path, serving: str) -> dict[str, float | int] | None:
    """Of the engine that serves, on the test images, as its evaluation says; its files are not gone through for a list."""
    try:
        body = unseal((run / stage_folder("evaluation") / serving / MANIFEST).read_bytes())
        estimate = Evaluation.read(body["record"]).metrics.get("accuracy") if body is not None else None
    except (OSError, StoreError, KeyError, TypeError):
        return None
    return estimate_json(estimate) if estimate is not None else None


def told(run: dict[str, Any]) -> str:
    """One run as a line."""
    outcome = f"{run['outcome']} version {run['version']}" if run["version"] else run["outcome"]
    if run["progress"]:
        return f"{shown_utc(run['started'])}  {run['progress']}, running now"
    accuracy = f"accuracy {figure(run['accuracy'])} ({run['engine']})" if run["accuracy"] else ""
    chosen = "  ".join(f"--set {override}" for override in run["set"] or ())
    return f"{shown_utc(run['started'])}  {run['run']:32} {outcome:22} {accuracy}  {chosen}".rstrip()
