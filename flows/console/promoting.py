"""Promotions that were started from a page: each a `visionloop promote` of its own, whose end the page waits for.

A promotion takes seconds and imports an orchestrator; a page should neither hang for it nor share its process. Where this
process ends in between, the promotion goes on, and the ledger says how it ended.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import threading
from dataclasses import dataclass

from flows.workspace.workspace import Workspace

_MOST_S = 3600.0


@dataclass(frozen=True)
class Promoting:
    """One promotion, by its latest news."""

    version: str
    by: str
    """Who pressed the button; the ledger names the approver, and the flow that moved it."""
    since: datetime.datetime
    ended: bool = False
    error: str = ""


class Promotions:
    """Those of this process, the latest of each model and version."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._lock = threading.Lock()
        self._latest: dict[tuple[str, str], Promoting] = {}

    def start(self, model: str, version: str, by: str) -> Promoting:
        """Begin one, unless one of this version is on its way."""
        with self._lock:
            known = self._latest.get((model, version))
            if known is not None and not known.ended:
                return known
            made = Promoting(version, by, datetime.datetime.now(datetime.UTC))
            self._latest[model, version] = made
        threading.Thread(target=self._run, args=(model, made), daemon=True).start()
        return made

    def of(self, model: str, version: str) -> Promoting | None:
        """The latest one of a version; None where none was started here."""
        with self._lock:
            return self._latest.get((model, version))

    def _run(self, model: str, made: Promoting) -> None:
        command = [sys.executable, "-P", "-m", "flows", "promote", made.version, "--model", model, "--json"]
        try:
            done = subprocess.run(
                [*command, "--workspace", str(self._workspace.root)],
                cwd=self._workspace.root,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                start_new_session=True,
                timeout=_MOST_S,
            )
            error = "" if done.returncode == 0 else _message(done)
        except (OSError, subprocess.SubprocessError) as problem:
            error = f"visionloop promote could not be run to its end ({problem}); running it again goes on where it stopped"
        with self._lock:
            self._latest[model, made.version] = Promoting(made.version, made.by, made.since, ended=True, error=error)


def _message(done: subprocess.CompletedProcess[str]) -> str:
    """What the command said of its failure."""
    for line in reversed(done.stdout.splitlines()):
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if isinstance(told, dict) and told.get("message"):
            return str(told["message"])
    said = done.stderr.strip().splitlines()
    return said[-1] if said else f"visionloop promote ended with status {done.returncode} and said nothing"
