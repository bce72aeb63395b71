"""`visionloop train --dry-run` says what would run, and leaves no trace."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shapes import SMOKE, visionloop

from flows.training.run import STAGES
from flows.workspace.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)


def tree(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of all that is there."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in sorted(root.rglob("*"))}


def planned(root: Path, *arguments: str) -> dict[str, Any]:
    """The answer, and that nothing of the workspace is another than before."""
    before = tree(root)
    done = visionloop("train", "--dry-run", "--json", *arguments, cwd=root)
    assert done.returncode == 0, done.stderr
    assert tree(root) == before
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def states(plan: dict[str, Any]) -> dict[str, str]:
    return {f"{each['stage']} {each['instance']}".strip(): each["state"] for each in plan["stages"]}


def test_before_anything_ran_it_estimates_and_writes_nothing(workspace: Path) -> None:
    (workspace / "plugins" / "losses").mkdir(parents=True)
    shutil.copy(ROOT / "components" / "losses" / "_template.py", workspace / "plugins" / "losses" / "mine.py")
    lines = [line for line in SMOKE.splitlines() if not line.startswith("  fit:")]
    lines.insert(lines.index("export:"), "  phases: [{trains: all, loss: {loss: mine}, fit: {epochs: 3, batch_size: 16}}]")
    (workspace / "recipes" / "mine.yaml").write_text("\n".join(lines))
    with Workspace.find(workspace).locked("another run"):
        plan = planned(workspace, "-r", "mine")
    assert set(states(plan).values()) == {"computed"}
    assert plan["stages"][1] == {
        "stage": "splitting",
        "instance": "",
        "state": "computed",
        "unless": "validation gives what it gave before",
    }
    (phase,) = plan["phases"]
    # 180 files: 30 % test, and of the others 15 % valid and 12 % calibration.
    assert (plan["split"], phase["num_train"], phase["num_valid"], phase["num_cached"]) == (False, 92, 19, None)
    assert plan["training_seconds"] == phase["seconds"] > 0
    told = visionloop("train", "--dry-run", "-r", "mine", cwd=workspace).stdout
    assert f"[1/{len(STAGES)}] validation: computed\n" in told
    assert "which images train is known when they are validated and split" in told
    assert "phase 1, everything: about 92 train images, about 19 valid; at most 3 epochs of 6 steps, 16 images each" in told
    assert "images)" in told
    assert "a step, timed on " in told


@pytest.mark.slow
def test_after_a_run_it_knows_what_is_in_the_store_and_in_the_caches(phased: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(phased, tmp_path / "copy", symlinks=True))
    visionloop("runs", cwd=root)  # any command settles a workspace that was copied
    plan = planned(root, "-r", "phased")
    others = {name: state for name, state in states(plan).items() if not name.endswith("-latency")}
    assert {name.split()[0] for name in others} == {*STAGES, "serving_check"}
    assert "evaluation slices" in others
    assert "evaluation onnxruntime-fp32-corrupted" in others
    measured = [state for name, state in states(plan).items() if name.endswith("-latency")]
    if set(measured) == {"stored"}:  # the machine may have been busy, and then they are measured again
        assert set(others.values()) == {"stored"}
    assert (plan["phases"], plan["training_seconds"]) == ([], None)
    again = states(planned(root, "-r", "phased", "--measure-again"))
    assert [again[f"evaluation {name}-latency"] for name in ("torch_reference-fp32", "onnxruntime-fp32")] == ["computed"] * 2
    longer = planned(root, "-r", "phased", "--set", "training.phases.1.fit.epochs=9")
    found = states(longer)
    assert (found["splitting"], found["training"], found["export graph"]) == ("stored", "computed", "computed")
    first, second = longer["phases"]
    assert (first["kind"], first["num_cached"] == first["num_rows"]) == ("pictures", True)
    assert (second["kind"], second["views"], second["epochs"], second["num_cached"]) == ("maps", 2, 9, None)
    assert first["num_rows"] == first["num_train"] + first["num_valid"]
    other = planned(root, "-r", "phased", "--set", "splitting.valid_share=0.2")
    assert (states(other)["splitting"], other["split"]) == ("computed", True)
    assert other["phases"][0]["num_valid"] > first["num_valid"]


def test_what_a_run_refuses_it_refuses_in_the_same_words(workspace: Path, prefect_server: str) -> None:
    def refused(*arguments: str) -> str:
        dry, wet = (visionloop("train", "-r", "smoke", *more, *arguments, cwd=workspace) for more in (["--dry-run"], []))
        assert (dry.returncode, wet.returncode) == (2, 2)
        assert dry.stderr.splitlines()[-1] == wet.stderr.splitlines()[-1]
        return dry.stderr

    assert "unknown gate 'luck'" in refused("--set", "gating.gates=[{gate: luck}]")
    assert "training.compute.device is cuda, and torch finds no GPU here" in refused("-s", "training.compute.device=cuda")
    assert "VISIONLOOP_RAY_ADDRESS names none" in refused("-s", "training.compute={launcher: ray, processes: 2}")
    # Before the run's validation and splitting, and with what these gave.
    assert "unknown class in packaging.critical 'crak'; valid: cross, disc, stripes" in refused(
        "--set", "packaging.critical={crak: 0.01}"
    )
    too_few = ["-s", "training.fit.batch_size=4096", "-s", "training.compute.accumulate=64"]
    assert "images (training.fit: the train split) cannot be computed in 64 parts" in refused(*too_few)
    assert "cannot be proven by" in refused("--set", "packaging.critical={disc: 0.01}")
    next((workspace / "data" / "disc").glob("*.png")).unlink()
    assert "1 deleted" in refused()


def test_it_starts_no_orchestrator(workspace: Path) -> None:
    code = "import sys; from flows.cli.app import app; app(sys.argv[1:], standalone_mode=False); print('prefect' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "-r", "smoke", "--dry-run", "-w", str(workspace)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.splitlines()[-1] == "False"
