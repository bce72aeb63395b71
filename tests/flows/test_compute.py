"""What a training is computed on: it is part of its key, and whoever looks at the model is told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import torch
from shapes import visionloop

from components import dataversions
from components.contracts.data import Splits
from components.contracts.records import Stored
from flows.terminal import Console
from flows.training import keys
from flows.training.run import STAGES, Run
from flows.workspace.recipes import load_recipe
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
TOLD = "the processor, in bf16, every batch in 2 parts, channels last"


def test_a_gpu_is_part_of_the_key_of_a_training_and_the_processor_is_not(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataversions.verify(workspace)
    splits = Stored(Splits.model_construct(schema_version=1, classes=("disc",)), workspace)

    def inputs(gpu: str, device: str) -> dict[str, str]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpu))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: gpu)
        found = Workspace.find(workspace)
        config = load_recipe("smoke", [f"training.compute.device={device}"], workspace=workspace)
        settings = read_settings(found.state)
        return keys.training_inputs(Run(found, config, data, settings, Console(len(STAGES), quiet=True)), splits)

    plain = inputs("", "cpu")
    assert "device" not in plain
    assert plain == inputs("A GPU", "cpu")
    without, one, other = inputs("", "auto"), inputs("A GPU", "auto"), inputs("Another GPU", "auto")
    assert "device" not in without
    assert (one.pop("device"), other.pop("device")) == ("cuda A GPU", "cuda Another GPU")
    assert one == other == without


@pytest.mark.slow
def test_a_training_that_was_not_the_plain_one_says_so_wherever_the_model_is_looked_at(
    phased: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((phased / "summary.json").read_text())
    assert summary["computed_on"] == TOLD
    assert TOLD in Path(summary["report"]).read_text()
    root = Path(shutil.copytree(phased, tmp_path / "copy", symlinks=True))
    shown = visionloop("show", str(summary["version"]), cwd=root)
    assert f"Trained on {TOLD}." in shown.stdout, shown.stderr
    assert f"    training on {TOLD}" in visionloop("train", "-r", "phased", "--dry-run", cwd=root).stdout
    mlflow.set_tracking_uri(f"sqlite:///{root}/.visionloop/mlflow.db")
    client = mlflow.MlflowClient()
    version = client.get_model_version("shapes", str(summary["version"]))
    params = client.get_run(version.run_id or "").data.params
    assert params["training.computed_on"] == TOLD
    assert (params["training.compute.precision"], params["training.compute.accumulate"]) == ("bf16", "2")
    cards = [path.read_text() for path in Path(root, ".visionloop").rglob("model-card.md")]
    assert {f"- Trained on: {TOLD}" in text for text in cards} == {True}


def workers_of(run: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train for a run, once both do."""
    until = time.monotonic() + 240
    while time.monotonic() < until:
        assert run.poll() is None, run.communicate()
        found = [one for one in psutil.Process(run.pid).children(recursive=True) if _trains(one)]
        if len(found) == 2:
            return found
        time.sleep(0.1)
    raise AssertionError("nobody trains")


def _trains(process: psutil.Process) -> bool:
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    return "components.training_worker" in command and "torch.distributed.run" not in command


@pytest.mark.slow
def test_a_killed_process_or_a_stopped_run_ends_with_one_line_and_the_same_command_goes_on(workspace: Path) -> None:
    sets = ["training.compute.launcher=torchrun", "training.compute.processes=2", "training.fit.epochs=40"]
    command = [sys.executable, "-m", "flows", "train", "-r", "smoke", *(part for one in sets for part in ("-s", one))]
    environment = os.environ | {"VISIONLOOP_NUM_THREADS": "2"}

    def run() -> subprocess.Popen[str]:
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*command, "-w", str(workspace)], cwd=ROOT, env=environment, **pipes)

    killed = run()
    going_on = workers_of(killed)
    wait_for_a_checkpoint(workspace)
    going_on[1].kill()
    told = killed.communicate(timeout=120)[1]
    assert (killed.returncode, psutil.wait_procs(going_on, timeout=10)[1]) == (2, []), told
    assert f"was killed before its end (pid {going_on[1].pid})" in told
    assert "Traceback" not in told
    stopped = run()
    going_on = workers_of(stopped)
    stopped.send_signal(signal.SIGINT)
    assert stopped.wait(timeout=60) == 130
    assert psutil.wait_procs(going_on, timeout=10)[1] == []
    stopped.communicate()
    last = run()
    answered, told = last.communicate(timeout=600)
    assert last.returncode in (0, 1), told
    assert "trained on the processor, by 2 processes" in answered


def wait_for_a_checkpoint(workspace: Path) -> None:
    until = time.monotonic() + 120
    while not list(workspace.glob(".visionloop/store/.partial/training-*/progress-1.json")):
        assert time.monotonic() < until
        time.sleep(0.1)
