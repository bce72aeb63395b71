from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from flows.terminal import Console
from flows.training.past_runs import past_runs, told
from flows.training.progress import PROGRESS, reported, running
from flows.workspace.workspace import Workspace


def test_others_see_how_far_a_run_is_as_long_as_it_goes_on(tmp_path: Path) -> None:
    workspace = Workspace.create(tmp_path / "workspace")
    folder = workspace.runs / "smoke-1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"started": "2026-11-30T06:00:00+00:00"}))
    console = Console(9, quiet=True)
    with reported(console, folder, model="shapes", asked_by="Ann"):
        with console.stage("training", 3) as (progress, _):
            (seen,) = running(workspace)
            assert (seen.model, seen.asked_by, seen.told()) == ("shapes", "Ann", "smoke-1: stage 3 of 9, training")
            progress(10, 40, "epoch 1")
            progress(20, 40, "epoch 2")
            assert running(workspace)[0].done == 0, "written once a second at most"
        with console.stage("export", 4) as (progress, _):
            assert running(workspace)[0].stage == "export", "a new stage is told at once"
            (run,) = past_runs(workspace)
            assert told(run).endswith("smoke-1: stage 4 of 9, export, running now")
        # What a killed run leaves: its process has ended, or another one has its number.
        kept = (folder / PROGRESS).read_text()
    assert running(workspace) == []
    assert past_runs(workspace)[0]["progress"] is None
    ended = subprocess.Popen(["true"])
    ended.wait()
    for change in ({"pid": ended.pid}, {"pid": 1}, {"began": "another boot"}, {"stage": None, "more": 1}):
        (folder / PROGRESS).write_text(json.dumps(json.loads(kept) | change))
        assert running(workspace) == [], change
    (folder / PROGRESS).write_text(kept)
    assert len(running(workspace)) == 1, "the file itself was right"


def test_a_note_holds_until_the_next_or_until_something_else_is_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line is shown every ten seconds, and an epoch's end was on next to none of them."""
    now = itertools.count(step=4)
    monkeypatch.setattr("flows.terminal.time", SimpleNamespace(monotonic=lambda: next(now)))
    with Console(9).stage("training", 3) as (progress, _):
        for done, note in enumerate(["phase 1, epoch 1", "", "", "epoch 1: valid 0.9", "", ""]):
            progress(done, 5, note)
        for done in range(5, 8):
            progress(done, 9)
    shown = capsys.readouterr().err.splitlines()[1:-1]
    assert shown == ["[3/9] training: 2/5 phase 1, epoch 1", "[3/9] training: 5/5 epoch 1: valid 0.9", "[3/9] training: 7/9"]


def test_a_disk_that_takes_nothing_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flows.training.progress.write_atomically", full)
    console = Console(9, quiet=True)
    with reported(console, tmp_path / "gone", model="shapes", asked_by=""), console.stage("training", 3) as (progress, _):
        progress(1, 2)
