"""Trials into MLflow from a thread that no training waits for; what MLflow does not take is written by the next search."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from components.contracts.errors import in_short
from components.contracts.records import canonical_json
from components.contracts.wording import counted
from flows.terminal import Say
from flows.tuning.space import shown
from flows.tuning.study import Study, Trial
from registry.searches import StudyRun, TrialRun, record

_PATIENCE_S = 30.0


class Recorder:
    """Sends the trials that ended whenever it is told that there are more."""

    def __init__(self, study: Study, model: str, tracking_uri: str, artifacts: Path | None, say: Say) -> None:
        self._study, self._model, self._say = study, model, say
        self._where = tracking_uri, artifacts
        self._waiting, self._closing = threading.Event(), threading.Event()
        self._problem = ""
        self._thread = threading.Thread(target=self._send, daemon=True, name="mlflow-search")
        self._thread.start()

    def more(self) -> None:
        """A trial ended."""
        self._waiting.set()

    def close(self, *, done: bool) -> None:
        """Send what is left, waiting for a while; says so where MLflow did not take it. `done`: the search has ended."""
        self._closing.set()
        self._waiting.set()
        self._thread.join(_PATIENCE_S)
        if not self._thread.is_alive():
            self._problem = self._try(done=done)
        if self._thread.is_alive() or self._problem:
            why = self._problem or f"no answer within {_PATIENCE_S:g} s"
            self._say(f"    MLflow lacks trials ({why}); the same command writes them when it answers")

    def _send(self) -> None:
        while not self._closing.is_set():
            self._waiting.wait()
            self._waiting.clear()
            if not self._closing.is_set():
                self._problem = self._try(done=False)

    def _try(self, *, done: bool) -> str:
        """Send all; what went wrong, else nothing."""
        ended = [trial for trial in list(self._study.trials) if trial.finished]
        try:
            record(*self._where, self._run(ended), [_run_of(trial) for trial in ended], done=done)
        except Exception as error:
            return in_short(error)
        return ""

    def _run(self, ended: Sequence[Trial]) -> StudyRun:
        study, best = self._study, self._study.best
        return StudyRun(
            model=self._model,
            name=study.name,
            key=f"{study.name} {study.digest(0)[:32]}",
            params={
                key: value if isinstance(value, str) else canonical_json(value) for key, value in study.identity.items()
            },
            tags={
                "visionloop.trials": counted(len(ended), "trial"),
                "visionloop.study_digest": study.digest(),
                **({"visionloop.best_trial": str(best.number)} if best is not None else {}),
            },
        )


def _run_of(trial: Trial) -> TrialRun:
    valid = {f"valid.{name}": float(value) for name, value in trial.facts.get("valid", {}).items()}
    objective = {} if trial.value is None else {"objective": trial.value}
    reason = str(trial.facts.get("reason") or "")
    return TrialRun(
        number=trial.number,
        state=trial.state,
        params={key: shown(value) if isinstance(value, str) else repr(value) for key, value in trial.params.items()},
        metrics={**valid, **objective},
        history=trial.facts.get("history", ()),
        tags={"visionloop.weights_sha256": str(trial.facts.get("weights", "")), **({"reason": reason} if reason else {})},
    )
