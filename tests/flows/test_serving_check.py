"""A release is asked in the real server before it is registered; one that does not serve is rejected, not an error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from served import smoke_release, variant
from shapes import visionloop

from components import plugins
from components.answering import decided, golden_vectors
from components.contracts.errors import EngineUnavailable
from components.contracts.records import Stored
from components.contracts.releases import Release
from components.contracts.verdicts import EngineVerdict, Finding, Verdict
from components.releases import GOLDEN
from flows.training import serving_check, trial_server
from flows.training.serving_check import ServingCheck, check, with_finding

TASK = """from components.tasks.classification import Task as Classification


class Task(Classification):
    def {method}:
        import os, signal, sys, time

        # Who trains reads the answers by this task, too.
        if "serving.server" in sys.modules or "serving.engines.worker" in sys.modules:
            {act}
        return super().{call}
"""
PROBABILITIES = {"method": "probabilities(self, logits, temperature)", "call": "probabilities(logits, temperature)"}
OUTPUTS = {"method": "outputs(self, classes)", "call": "outputs(classes)"}


@pytest.fixture
def release(trained: Path) -> Stored[Release]:
    return smoke_release(trained)


def broken(release: Stored[Release], folder: Path, act: str, method: dict[str, str]) -> tuple[Stored[Release], Path]:
    """The release with a task of a workspace's own that does something in the server, and the folder of its plug-ins."""
    tasks = folder / "plugins" / "tasks"
    tasks.mkdir(parents=True)
    (tasks / "odd.py").write_text(TASK.format(act=act, **method))
    return variant(release, folder / "release", task="odd"), folder / "plugins"


def out(folder: Path) -> Path:
    made = folder / "out"
    made.mkdir()
    return made


def servers(folder: Path) -> list[int]:
    """Processes whose command line names the folder."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        told = " ".join(process.info["cmdline"] or ())
        if str(folder) in told and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.info["pid"])
    return found


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE}


def test_a_release_that_serves_passes_and_nothing_is_left_of_the_server(release: Stored[Release], tmp_path: Path) -> None:
    before, made = children(), out(tmp_path)
    found = check(release, out=made)
    golden = golden_vectors(release.record, release.folder / GOLDEN)
    assert found.finding.status == "pass", found.finding.message
    assert (found.finding.gate, found.finding.n, found.finding.threshold) == ("serves", 16, golden.tolerance)
    assert found.finding.value is not None
    assert found.finding.value <= golden.tolerance
    assert children() == before
    assert [path.name for path in made.iterdir()] == ["server.log"]
    log = (made / "server.log").read_text()
    # Every golden picture over HTTP and over gRPC reached this server, and the place where it ran is not told.
    assert f'"release": "{release.record.digest()}"' in log
    assert str(tmp_path) not in log


@pytest.mark.parametrize(
    ("act", "method", "expected"),
    [
        ("raise ValueError('odd')", PROBABILITIES, "did not take the release"),
        ("os._exit(3)", PROBABILITIES, "the engine's process died while it loaded the release"),
        ("return 1 - super().probabilities(logits, temperature)", PROBABILITIES, "answers its golden vectors wrongly"),
        ("os._exit(7)", OUTPUTS, "the server ended with status 7 before it was ready"),
    ],
)
def test_a_release_that_the_server_does_not_take_fails(
    release: Stored[Release], tmp_path: Path, act: str, method: dict[str, str], expected: str
) -> None:
    odd, folder = broken(release, tmp_path, act, method)
    found = check(odd, out=out(tmp_path), plugin_folder=folder)
    assert (found.finding.status, found.timed_out) == ("fail", False)
    assert expected in found.finding.message
    assert "the server's last lines: " in found.finding.message
    assert str(tmp_path) not in found.finding.message
    assert servers(tmp_path) == []


@pytest.mark.parametrize(
    ("act", "method", "expected"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", OUTPUTS, "the server was killed, perhaps for want of memory"),
        ("raise MemoryError", PROBABILITIES, "the server says 'MemoryError'"),
    ],
)
def test_a_fault_of_the_machine_is_an_error_and_no_verdict(
    release: Stored[Release], tmp_path: Path, act: str, method: dict[str, str], expected: str
) -> None:
    odd, folder = broken(release, tmp_path, act, method)
    with pytest.raises(EngineUnavailable, match=expected):
        check(odd, out=out(tmp_path), plugin_folder=folder)
    assert servers(tmp_path) == []


def test_no_process_to_be_had_is_an_error(release: Stored[Release], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", none)
    with pytest.raises(EngineUnavailable, match="could not be started on this machine.*temporarily unavailable"):
        check(release, out=out(tmp_path))


def test_a_server_that_hangs_is_ended_when_its_time_is_over(
    release: Stored[Release], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd, folder = broken(release, tmp_path, "time.sleep(1000)", PROBABILITIES)
    before = children()
    monkeypatch.setattr(trial_server._Running, "waited_s", lambda _: 0.0)  # on a busy machine, it would be its fault
    found = check(odd, out=out(tmp_path), plugin_folder=folder, limit_s=4.0)
    assert (found.finding.status, found.timed_out) == ("fail", True)
    assert "was not ready within 4 s" in found.finding.message
    assert (servers(tmp_path), children()) == ([], before)


def test_waiting_for_a_processor_costs_a_server_no_time_and_is_never_the_release_s_fault(
    release: Stored[Release], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd, folder = broken(release, tmp_path, "time.sleep(1000)", PROBABILITIES)
    monkeypatch.setattr(trial_server._Running, "waited_s", lambda _: 1e6)
    with pytest.raises(EngineUnavailable, match="other programs took its processors"):
        check(odd, out=out(tmp_path), plugin_folder=folder, limit_s=0.5)
    assert servers(tmp_path) == []


def test_whatever_interrupts_the_questions_ends_the_server(
    release: Stored[Release], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = children()
    seen: list[set[int]] = []

    def interrupted(_: Any) -> float:
        seen.append(children() - before)
        raise KeyboardInterrupt

    monkeypatch.setattr(serving_check._Asking, "ask", interrupted)
    made = out(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        check(release, out=made)
    assert len(seen[0]) >= 2  # the server and its engine were there
    assert children() == before
    assert [path.name for path in made.iterdir()] == ["server.log"]


def test_a_server_ends_with_a_run_that_is_killed(release: Stored[Release], tmp_path: Path) -> None:
    odd, folder = broken(release, tmp_path, "time.sleep(1000)", PROBABILITIES)
    made = out(tmp_path)
    program = (
        "import json, sys; from pathlib import Path; from components.contracts.records import Stored; "
        "from components.contracts.releases import Release; from flows.training.serving_check import check; "
        "release = Stored(Release.read(json.loads(sys.argv[1])), Path(sys.argv[2])); "
        "check(release, out=Path(sys.argv[3]), plugin_folder=Path(sys.argv[4]))"
    )
    told = [json.dumps(odd.record.to_json()), str(odd.folder), str(made), str(folder)]
    run = subprocess.Popen([sys.executable, "-c", program, *told])
    deadline = time.monotonic() + 60
    while not servers(made / "server"):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.kill()
    run.wait()
    while servers(made / "server"):
        assert time.monotonic() < deadline, "the server outlived the run that started it"
        time.sleep(0.05)


def test_a_server_with_another_release_or_rule_is_seen(release: Stored[Release], tmp_path: Path) -> None:
    other = variant(release, tmp_path / "other", threshold=0.97)
    with trial_server.trial_server(
        release, folder=tmp_path / "server", log=tmp_path / "log", plugins=None, limit_s=60
    ) as server:
        assert serving_check._Asking(release, server).ask() >= 0
        with pytest.raises(trial_server.DoesNotServe, match=r"threshold .*, expected 0\.97; release .*, expected"):
            serving_check._Asking(other, server).ask()


def answer_of(release: Stored[Release], index: int = 0) -> dict[str, Any]:
    """What a server answers to a golden picture."""
    golden = golden_vectors(release.record, release.folder / GOLDEN)
    task = plugins.load("tasks", release.record.task, dict(release.record.task_settings))
    row = golden.probabilities[index]
    decision = decided(release.record, task, row[None])[0]
    classes = release.record.engine.classes
    numbers = dict(zip(classes, map(float, row), strict=True))
    return {
        "label": decision.label,
        "unsure": decision.unsure,
        "confidence": decision.confidence,
        "probabilities": numbers,
    }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"label": "hexagon"}, "'hexagon' .* by the release's decision rule it is"),
        ({"unsure": True}, r"unsure: True\) with confidence .* it is '\w+' \(unsure: False\)"),
        ({"confidence": 0.1}, "a probability differs by 0.[0-9]+ from the golden one"),
        ({"confidence": float("nan")}, "a probability differs by nan"),
        ({"probabilities": {"cross": 1.0}}, "is no answer of this release"),
        ({"probabilities": {"cross": 1 / 3, "disc": 1 / 3, "stripes": 1 / 3}}, "a probability differs by"),
        ({"label": None, "confidence": None}, "is no answer of this release"),
    ],
)
def test_a_wrong_answer_is_told_with_what_was_asked(release: Stored[Release], change: dict[str, Any], expected: str) -> None:
    server: Any = None
    asking = serving_check._Asking(release, server)
    assert asking._difference("picture 0", 0, answer_of(release)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(trial_server.DoesNotServe, match=f"picture 0: .*{expected}"):
        asking._difference("picture 0", 0, {**answer_of(release), **change})


def test_a_label_that_other_numbers_within_the_tolerance_give_is_right(release: Stored[Release]) -> None:
    """The rule is applied to the numbers that were served, so that a picture on the threshold fails nothing."""
    server: Any = None
    asking = serving_check._Asking(release, server)
    golden = golden_vectors(release.record, release.folder / GOLDEN)
    moved = golden.probabilities[0] - np.float32(golden.tolerance / 2)
    threshold = float(moved.max()) + golden.tolerance / 4
    rule = release.record.decision.model_copy(update={"threshold": threshold})
    asking._release = release.record.model_copy(update={"decision": rule})
    classes = release.record.engine.classes
    told = {
        "label": "unsure",
        "unsure": True,
        "confidence": float(moved.max()),
        "probabilities": dict(zip(classes, map(float, moved), strict=True)),
    }
    assert asking._difference("picture 0", 0, told) <= golden.tolerance
    with pytest.raises(trial_server.DoesNotServe, match="decision rule it is 'unsure'"):
        asking._difference("picture 0", 0, {**told, "unsure": False})


def test_only_the_serving_engine_gets_the_finding_and_a_fail_ends_the_verdict() -> None:
    passed = Finding(gate="accuracy", status="pass", message="good")
    engines = tuple(
        EngineVerdict(engine=name, engine_digest=name, required=True, serving=name == "a", status="pass", findings=(passed,))
        for name in ("a", "b")
    )
    verdict = Verdict(status="pass", serving_engine="a", engines=engines, reasons=(), policy_digest="p")
    serves = Finding(gate="serves", status="pass", message="yes")
    found = with_finding(verdict, serves)
    assert (found.status, found.engines[0].findings, found.engines[1]) == ("pass", (passed, serves), engines[1])
    failed = with_finding(verdict, serves.model_copy(update={"status": "fail", "message": "no"}))
    assert (failed.status, failed.reasons, failed.engines[0].status) == ("fail", ("a: serves: no",), "fail")
    assert failed.engines[1] == engines[1]


def test_a_release_that_does_not_serve_is_a_rejection_that_is_told_everywhere(
    trained: Path, tmp_path: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.training import keys, steps

    monkeypatch.setattr(keys, "worth_measuring_again", lambda _: False)
    root = Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))
    asked: list[str] = []
    results = [
        ServingCheck(finding=Finding(gate="serves", status="fail", message="it was not ready"), timed_out=True),
        ServingCheck(finding=Finding(gate="serves", status="fail", message="POST /predict: status 503")),
    ]

    def stubbed(release: Stored[Release], **_: Any) -> ServingCheck:
        asked.append(release.record.digest())
        return results[len(asked) - 1]

    monkeypatch.setattr(steps, "check", stubbed)

    def train() -> dict[str, Any]:
        done = visionloop("train", "-r", "smoke", "--set", "packaging.golden_images=8", "--json", cwd=root)
        assert done.returncode == 1, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found

    first = train()
    assert (first["outcome"], first["verdict"]) == ("rejection", "fail")
    assert first["reasons"] == ["openvino-int8: serves: it was not ready"]
    second = train()  # what failed by its time alone is asked again
    assert second["reasons"] == ["openvino-int8: serves: POST /predict: status 503"]
    assert second["seconds"]["serving_check"]["cached"] is False
    third = train()  # what failed otherwise is known
    assert third["seconds"]["serving_check"]["cached"] is True
    assert (third["reasons"], len(asked)) == (second["reasons"], 2)
    found = [f for f in third["findings"] if f["gate"] == "serves"]
    assert [(f["engine"], f["engine_status"], f["status"]) for f in found] == [("openvino-int8", "fail", "fail")]
    assert "POST /predict: status 503" in Path(third["report"]).read_text()
    rows = json.loads(visionloop("history", "--json", cwd=root).stdout.strip().splitlines()[-1])["entries"]
    assert [row["kind"] for row in rows] == ["requested", "rejected"]
    assert (rows[1]["body"]["status"], rows[1]["body"]["bound"]["verdict"]) == ("fail", "fail")
    assert rows[1]["body"]["bound"]["release"] == asked[0]
    engines = json.loads(visionloop("engine", "list", "--all", "--json", cwd=root).stdout.strip().splitlines()[-1])[
        "engines"
    ]
    assert "serves: it was not ready" in json.dumps(engines)
    shown = visionloop("show", "1", cwd=root).stdout
    assert "16 golden pictures got the golden answers" in shown
    assert os.path.lexists(Path(third["run_folder"]) / "7-serving_check")
    plan = json.loads(visionloop("train", "-r", "smoke", "--dry-run", "--json", cwd=root).stdout.strip().splitlines()[-1])
    assert [s["state"] for s in plan["stages"] if s["stage"] == "serving_check"] == ["stored"]


def test_where_the_recipe_leaves_the_choice_open_the_next_engine_serves(
    trained: Path, tmp_path: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.training import keys, steps

    monkeypatch.setattr(keys, "worth_measuring_again", lambda _: False)
    root = Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))
    asked: list[str] = []
    serving = 1

    def stubbed(release: Stored[Release], **_: Any) -> ServingCheck:
        asked.append(release.record.engine.name)
        if len(asked) <= 2 - serving:
            return ServingCheck(finding=Finding(gate="serves", status="fail", message=f"status 503 of {asked[-1]}"))
        return ServingCheck(finding=Finding(gate="serves", status="pass", message="it was asked"))

    monkeypatch.setattr(steps, "check", stubbed)
    auto = ("--set", "export.serving=auto", "--set", "export.limits.drop=0.2", "--json")

    def train(golden: int, *more: str) -> dict[str, Any]:
        told = visionloop("train", "-r", "smoke", *auto, "--set", f"packaging.golden_images={golden}", *more, cwd=root)
        found: dict[str, Any] = json.loads(told.stdout.strip().splitlines()[-1])
        return found

    done = train(8)
    first, second = asked
    assert {first, second} == {"onnxruntime-fp32", "openvino-int8"}
    assert (done["outcome"], done["verdict"], done["serving_engine"]) == ("candidate", "pass", second)
    said = {(f["engine"], f["gate"]): (f["engine_status"], f["status"], f["message"]) for f in done["findings"]}
    assert said[first, "serves"] == ("fail", "fail", f"status 503 of {first}")
    assert said[second, "serves"] == ("pass", "pass", "it was asked")
    assert said[second, "serving"][2].startswith("chosen of 1 engine that passed every gate")
    assert (first, "serving") not in said
    shown = json.loads(visionloop("show", done["version"], "--json", cwd=root).stdout)
    assert shown["bound"]["serving"] == second
    files = (root / ".visionloop" / "mlflow-artifacts").rglob("model-card.md")
    card = max(files, key=lambda path: path.stat().st_mtime).read_text()
    assert f"{first}: does not serve: status 503 of {first}" in card
    release = json.loads((Path(done["run_folder"]) / "7-packaging" / "manifest.json").read_text())
    assert f'"name": "{second}"' in json.dumps(release)
    # Nobody is asked again, neither by the next run nor as the plan tells it.
    assert (train(8)["serving_engine"], len(asked)) == (second, 2)
    plan = train(8, "--dry-run")
    states = [(s["stage"], s["state"]) for s in plan["stages"] if s["stage"] in ("packaging", "serving_check")]
    assert states == [("packaging", "stored"), ("serving_check", "stored")] * 2
    # Where none serves, none is chosen, and what came of each is told.
    asked.clear()
    serving = 0
    refused = train(9)
    assert (refused["outcome"], refused["verdict"], len(asked)) == ("rejection", "fail", 2)
    assert {f"{name}: serves: status 503 of {name}" for name in asked} <= set(refused["reasons"])
