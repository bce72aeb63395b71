"""A search through the command line, on small real pictures."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray_head import ray_head
from shapes import SMOKE, free_port, make_workspace, visionloop, visionloop_process, write_pictures

from components.contracts.models import Checkpoint
from components.store import Store
from flows.tuning.study import Study
from flows.workspace.settings import num_threads, sqlite_url

SEARCH = """
search:
  trials: 5
  startup_trials: 4
  space:
    training.fit.learning_rate: {low: 0.0003, high: 0.03, log: true}
    training.backbone_settings.width: {choices: [4, 8]}
"""
QUICK = (
    SMOKE.replace("epochs: 6", "epochs: 2")
    .replace("serving: openvino-int8", "serving: onnxruntime-fp32")
    .replace("    - {target: openvino, precision: int8}\n", "")
)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Path:
    """A workspace in which a search came to its end; read it, or copy it."""
    root = make_workspace(tmp_path_factory.mktemp("searched") / "workspace")
    (root / "recipes" / "smoke.yaml").write_text(QUICK + SEARCH)
    done = visionloop("tune", "-r", "smoke", "--json", cwd=root)
    assert done.returncode == 0, done.stderr + done.stdout
    (root / "summary.json").write_text(done.stdout.strip().splitlines()[-1])
    (root / "said.txt").write_text(done.stderr)
    return root


@pytest.fixture
def root(searched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(searched, tmp_path / "workspace", symlinks=True))


def answer(root: Path, *arguments: str) -> dict[str, Any]:
    done = visionloop(*arguments, "--json", cwd=root)
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@contextlib.contextmanager
def tuning(root: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A search in a process of its own."""
    with subprocess.Popen(
        [sys.executable, "-m", "flows", "tune", "-r", "smoke", *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


def rows(root: Path, name: str = "smoke") -> list[tuple[Any, ...]]:
    study = Study(sqlite_url(root / ".visionloop" / "studies.db"), name)
    study.open()
    return [(one.number, one.params, one.state, one.value, one.curve, one.facts.get("weights")) for one in study.trials]


def test_the_summary_says_what_came_of_it(searched: Path) -> None:
    summary = json.loads((searched / "summary.json").read_text())
    assert sum(summary["trials"].values()) == 5
    assert summary["trials"]["running"] == summary["trials"]["failed"] == 0
    best = summary["best"]
    assert best["accuracy"]["n"] == 18  # the valid images
    assert best["accuracy"]["low"] < best["accuracy"]["value"] <= best["accuracy"]["high"]
    assert best["accuracy"]["value"] == best["value"] == max(row[3] or 0 for row in rows(searched))
    assert summary["own"]["trial"] == 0
    assert any("valid image" in line for line in summary["fit"])
    assert summary["alarms"] == []
    said = (searched / "said.txt").read_text()
    assert len(re.findall(r"trial \d of 5: ", said)) == 5
    assert "the best so far" in said
    # Nothing was exported, judged or registered.
    assert sorted(path.name for path in (searched / ".visionloop" / "store").glob("[!.]*")) == [
        "splitting",
        "training",
        "validation",
    ]
    assert visionloop("runs", cwd=searched).stdout.startswith("No runs yet")


def test_the_same_command_again_trains_nothing_and_more_trials_go_on(root: Path) -> None:
    before = rows(root)
    again = answer(root, "tune", "-r", "smoke")
    assert again["new_trials"] == 0
    first = json.loads((root / "summary.json").read_text())
    assert {key: again[key] for key in ("digest", "best", "own")} == {key: first[key] for key in ("digest", "best", "own")}
    more = answer(root, "tune", "-r", "smoke", "--trials", "6")
    assert more["new_trials"] == 1
    assert rows(root)[:5] == before
    assert more["digest"] != again["digest"]
    listed = answer(root, "study", "list")["studies"]
    assert [(one["study"], one["recipe"], one["digest"]) for one in listed] == [("smoke", "smoke", more["digest"])]
    shown = answer(root, "study", "show", "smoke")
    assert [trial["trial"] for trial in shown["trials"]] == list(range(6))
    assert shown["best"]["trial"] == more["best"]["trial"]
    text = visionloop("study", "show", "smoke", cwd=root).stdout
    assert re.search(r"^\* +\d+ +[01]\.\d{4}  2 epochs", text, re.MULTILINE)
    unknown = visionloop("study", "show", "smok", cwd=root)
    assert (unknown.returncode, "unknown study 'smok'; valid: smoke" in unknown.stderr) == (2, True)


def test_the_winner_is_a_recipe_that_is_judged_like_any_other_and_names_its_study(root: Path) -> None:
    summary = json.loads((root / "summary.json").read_text())
    written = yaml.safe_load((root / "recipes" / "smoke-tuned.yaml").read_text())
    assert "search" not in written
    assert written["model"] == "shapes"
    assert written["tuned"] == {
        "study": "smoke",
        "study_digest": summary["digest"],
        "trials": 5,
        "trial": summary["best"]["trial"],
    }
    chosen = summary["best"]["params"]
    assert written["training"]["fit"]["learning_rate"] == chosen["training.fit.learning_rate"]
    assert str(written["training"]["backbone_settings"]["width"]) == chosen["training.backbone_settings.width"]
    lenient = "gating.gates=[{gate: accuracy, settings: {floor: 0.05}}]"
    trained = answer(root, "train", "-r", "smoke-tuned", "-s", lenient)
    assert trained["outcome"] == "candidate"
    assert trained["seconds"]["training"]["cached"]
    checkpoint = Store(root / ".visionloop" / "store")
    folder = next(Path(trained["run_folder"]).glob("3-training")).resolve()
    found = checkpoint.open("training", folder.name, Checkpoint)
    assert found is not None
    assert found.record.weights.sha256 == summary["best"]["weights"]
    # The lineage names the study: in the run's folder, in MLflow, on the card and to the approver.
    config = json.loads((Path(trained["run_folder"]) / "config.json").read_text())
    assert config["run"]["study_digest"] == summary["digest"]
    shown = answer(root, "show", trained["version"])
    assert summary["digest"] in json.dumps(shown)
    cards = [path.read_text() for path in (root / ".visionloop" / "mlflow-artifacts").rglob("model-card.md")]
    assert [card for card in cards if summary["digest"][:12] in card]
    from mlflow import MlflowClient

    uri = f"sqlite:///{root / '.visionloop' / 'mlflow.db'}"
    client = MlflowClient(uri, registry_uri=uri)
    version = client.get_model_version("shapes", trained["version"])
    run = client.get_run(str(version.run_id))
    assert run.data.tags["visionloop.study_digest"] == summary["digest"]
    # What nothing reaches goes, and the winner's training stays though its run is not among the last.
    answer(root, "store", "gc")
    assert folder.is_dir()


def test_garbage_collection_keeps_the_best_training_of_a_study(root: Path) -> None:
    store = Store(root / ".visionloop" / "store")
    best = (root / ".visionloop" / "studies" / "smoke" / "best").resolve()
    assert best in {path.resolve() for path in store.artefacts()}
    others = [path for path in store.artefacts() if path.parent.name == "training" and path.resolve() != best]
    assert others
    # Neither the pinned data's artefacts nor the winner: only what lost.
    dead = [root / ".visionloop" / "store" / ".partial" / "training-0123"]
    dead[0].mkdir(parents=True)
    os.utime(dead[0], (1, 1))
    found = {Path(each["folder"]).name for each in answer(root, "store", "gc")["removed"]}
    assert {path.name for path in others} <= found
    assert best.is_dir()
    # What is gone all the same is told, and nothing points at it.
    shutil.rmtree(best)
    done = visionloop("tune", "-r", "smoke", cwd=root)
    assert done.returncode == 0, done.stderr
    assert "trained is not in the store of this workspace any more; `visionloop train` by the winner's" in done.stderr
    assert not (root / ".visionloop" / "studies" / "smoke" / "best").is_symlink()


def test_a_file_that_a_person_changed_is_never_written_over(root: Path) -> None:
    path = root / "recipes" / "smoke-tuned.yaml"
    written = path.read_text()
    path.write_text(written.replace("latency_runs: 40", "latency_runs: 50"))
    assert path.read_text() != written
    changed = path.read_bytes()
    before = rows(root)
    for arguments in (["--trials", "6"], ["--study", "other"]):
        done = visionloop("tune", "-r", "smoke", *arguments, cwd=root)
        assert (done.returncode, "is not what study" in done.stderr, "--write NAME" in done.stderr) == (2, True, True)
    assert (path.read_bytes(), rows(root)) == (changed, before)
    path.write_text(written)
    # Of another study it is another's too.
    done = visionloop("tune", "-r", "smoke", "--study", "other", cwd=root)
    assert (done.returncode, "is not what study 'other' wrote" in done.stderr) == (2, True)
    assert visionloop("tune", "-r", "smoke", "--write", "Not a name", cwd=root).returncode == 2
    assert answer(root, "tune", "-r", "smoke", "--write", "winner")["winner"] == "winner"


def test_a_study_of_another_recipe_or_data_version_is_refused(root: Path) -> None:
    before = rows(root)
    done = visionloop("tune", "-r", "smoke", "-s", "training.fit.epochs=3", cwd=root)
    assert (done.returncode, "is of another search" in done.stderr, "section training" in done.stderr) == (2, True, True)
    write_pictures(root / "more", 9, start=70)
    assert visionloop("data", "add", "more", cwd=root).returncode == 0
    done = visionloop("tune", "-r", "smoke", cwd=root)
    assert (done.returncode, "data version: " in done.stderr, "--study smoke-2" in done.stderr) == (2, True, True)
    assert rows(root) == before


def test_no_trial_reads_a_test_picture(root: Path, searched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test images hold no picture any more when the trials begin, and nothing of them was cached."""
    from components.samples import rows as samples
    from flows.training import steps

    real, spoiled = steps.splitting, []

    def splitting(run: Any, dataset: Any) -> Any:
        found = real(run, dataset)
        for path in samples(found, "test")["path"]:
            (run.workspace.data / path).write_bytes(b"not a picture")
            spoiled.append(path)
        return found

    monkeypatch.setattr(steps, "splitting", splitting)
    shutil.rmtree(root / ".visionloop" / "cache", ignore_errors=True)
    shutil.rmtree(root / ".visionloop" / "store" / "training")
    (root / ".visionloop" / "studies.db").unlink()
    (root / "recipes" / "smoke-tuned.yaml").unlink()
    before = rows(searched)[:3]
    assert answer(root, "tune", "-r", "smoke", "--trials", "3")["new_trials"] == 3
    assert len(spoiled) > 40
    assert rows(root) == before
    # They are what makes everything that reads them fail.
    monkeypatch.undo()
    assert visionloop("train", "-r", "smoke-tuned", cwd=root).returncode == 2


def test_a_search_that_is_killed_or_interrupted_goes_on_and_ends_in_the_same_bits(root: Path, searched: Path) -> None:
    """kill -9 in the middle of a trial and Ctrl-C in that of another one: nobody can tell afterwards."""
    (root / "recipes" / "smoke-tuned.yaml").unlink()
    shutil.rmtree(root / ".visionloop" / "store" / "training")
    (root / ".visionloop" / "studies.db").unlink()
    (root / ".visionloop" / "studies" / "smoke" / "best").unlink()
    said = ""
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        with tuning(root) as process:
            assert process.stderr is not None
            after = f"trial {1 if number == signal.SIGINT else 0} of 5: "
            for line in process.stderr:
                if after in line:
                    process.send_signal(number)
                    break
            said = process.stderr.read()
            assert process.wait() == status
        # Whom a person stops is no trial that ends its process.
        assert (root / ".visionloop" / "studies" / "smoke" / "attempts.json").exists() == (number == signal.SIGKILL)
        # Nothing collects the best training meanwhile.
        assert (root / ".visionloop" / "studies" / "smoke" / "best").resolve().is_dir()
    assert re.search(r"^stopped; the same command goes on with trial [23]$", said, re.MULTILINE)
    assert "Traceback" not in said
    assert answer(root, "tune", "-r", "smoke")["new_trials"] in (2, 3)
    assert rows(root) == rows(searched)
    assert list((root / ".visionloop" / "store" / ".partial").glob("*")) == []


def test_another_search_of_the_workspace_or_of_the_study_waits_outside(root: Path, tmp_path: Path) -> None:
    from flows.tuning.holding import holding
    from flows.workspace.workspace import Workspace

    with Workspace(root).locked("visionloop train something"):
        done = visionloop("tune", "-r", "smoke", "--trials", "6", cwd=root)
    assert (done.returncode, "is in use by `visionloop train something`" in done.stderr) == (2, True)
    with holding(sqlite_url(root / ".visionloop" / "studies.db"), "smoke"):
        done = visionloop("tune", "-r", "smoke", "--trials", "6", cwd=root)
    assert done.returncode == 2
    assert re.search(r"study 'smoke' is searched by the process \d+ on .*; wait for it to end", done.stderr)
    assert len(rows(root)) == 5


def test_a_recipe_that_cannot_be_searched_costs_no_time(root: Path) -> None:
    (root / "recipes" / "plain.yaml").write_text(QUICK.replace("name: smoke", "name: plain"))
    done = visionloop("tune", "-r", "plain", cwd=root)
    assert (done.returncode, "has no section search" in done.stderr, "getting ready" in done.stderr) == (2, True, False)
    wrong = "search={space: {training.fit.learning_rte: {low: 0.1, high: 0.2}}}"
    done = visionloop("tune", "-r", "smoke", "-s", wrong, cwd=root)
    assert (done.returncode, "'training.fit.learning_rte'; valid: batch_size" in done.stderr) == (2, True)
    assert "getting ready" not in done.stderr


def test_mlflow_shows_the_trials_nested_in_their_study_once(root: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{root / '.visionloop' / 'mlflow.db'}"
    client = MlflowClient(uri, registry_uri=uri)

    def runs() -> tuple[Any, dict[str, Any]]:
        experiment = client.get_experiment_by_name("shapes")
        assert experiment is not None
        found = client.search_runs([experiment.experiment_id])
        (parent,) = [run for run in found if "visionloop.study" in run.data.tags]
        nested = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        assert len(nested) == len({run.data.tags["visionloop.trial"] for run in nested})
        return parent, {run.data.tags["visionloop.trial"]: run for run in nested}

    parent, nested = runs()
    summary = json.loads((root / "summary.json").read_text())
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["visionloop.study_digest"] == summary["digest"]
    assert sorted(nested) == list("01234")
    for number, params, state, value, curve, weights in rows(root):
        run = nested[str(number)]
        assert run.info.status == {"complete": "FINISHED", "pruned": "KILLED"}[state]
        assert float(run.data.params["training.fit.learning_rate"]) == params["training.fit.learning_rate"]
        if state == "complete":
            assert run.data.metrics["objective"] == run.data.metrics["valid.accuracy"] == value
            assert run.data.tags["visionloop.weights_sha256"] == weights
        history = client.get_metric_history(run.info.run_id, "training.valid_accuracy")
        assert {one.step: one.value for one in history} == curve
    # One that was cut short is written again, and a search whose MLflow was away is caught up with by the next.
    client.delete_run(nested["1"].info.run_id)
    client.update_run(nested["2"].info.run_id, status="RUNNING")
    away = visionloop("tune", "-r", "smoke", "--trials", "6", cwd=root, VISIONLOOP_TRACKING_URI="http://127.0.0.1:9")
    assert away.returncode == 0, away.stderr
    assert re.search(r"MLflow lacks trials \(.*\); the same command writes them", away.stderr)
    assert sorted(runs()[1]) == list("0234")
    answer(root, "tune", "-r", "smoke", "--trials", "6")
    again = runs()[1]
    assert sorted(again) == list("012345")
    assert again["2"].info.status in ("FINISHED", "KILLED")
    history = client.get_metric_history(again["2"].info.run_id, "training.valid_accuracy")
    assert len(history) == len({one.step for one in history}) > 0


def test_several_processes_share_a_study_and_one_that_is_killed_is_replaced(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.tuning import workers as working

    started: list[Any] = []
    real = working.Process._start

    def start(self: Any) -> Any:
        process = real(self)
        started.append(process)
        return process

    killed: list[int] = []
    hear = working.Process._hear

    def hear_and_kill(self: Any, process: Any) -> Any:
        heard = hear(self, process)
        if "epoch" in heard and not killed:
            killed.append(process.pid)
            process.kill()
            process.wait()
        return heard

    monkeypatch.setattr(working.Process, "_start", start)
    monkeypatch.setattr(working.Process, "_hear", hear_and_kill)
    shutil.rmtree(root / ".visionloop" / "store" / "training")
    # Each has as many threads as the search of the fixture had, on which results depend.
    threads = {"VISIONLOOP_NUM_THREADS": str(2 * num_threads())}
    arguments = ("--study", "wide", "--write", "wide", "--workers", "2", "--trials", "4")
    done = visionloop("tune", "-r", "smoke", *arguments, cwd=root, **threads)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("its process was ended by SIGKILL") == len(killed) == 1
    assert len(started) == 3
    assert all(process.poll() is not None for process in started)
    found = rows(root, "wide")
    assert [row[2] for row in found] == ["complete"] * 4
    alone = {str(row[1]): row[5] for row in rows(root)}
    common = [row for row in found if str(row[1]) in alone]
    assert len(common) >= 3
    assert all(row[5] == alone[str(row[1])] for row in common)


def test_a_worker_ends_with_the_search_that_started_it(root: Path) -> None:
    """While it waits for an answer: nothing that it writes or reads would end it."""
    import psutil

    from flows.workspace.data import ensure
    from flows.workspace.recipes import load_recipe
    from flows.workspace.workspace import Workspace

    config = load_recipe("smoke", workspace=root)
    data = ensure(Workspace(root), config.source, config.source_settings)
    (splits,) = (root / ".visionloop" / "store" / "splitting").iterdir()
    search = f"""
import time
from flows.tuning.trial import Place
from flows.tuning.workers import Process
from flows.workspace.recipes import RunConfig
worker = Process(Place({str(root)!r}, {data.to_json()!r}, {splits.name!r}, 1))
def on_epoch(row):
    print(worker.pid, flush=True)
    time.sleep(600)
config = RunConfig.model_validate_json({json.dumps(config.to_json())!r}, strict=True)
worker.train(0, config, on_epoch, lambda *_: None)
"""
    with subprocess.Popen([sys.executable, "-c", search], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = psutil.Process(int(process.stdout.readline()))
        process.kill()
    try:
        worker.wait(30)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()


def test_the_page_needs_no_network_and_shows_what_was_found(root: Path) -> None:
    summary = json.loads((root / "summary.json").read_text())
    page = Path(summary["page"].replace(summary["page"].split("/.visionloop/")[0], str(root)))
    text = page.read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    assert text.count("<svg") >= 4
    assert f"trial {summary['best']['trial']}" in text
    assert summary["fit"][0] in text.replace("&#39;", "'")
    assert "takes 8, and more say more" in text  # too few trials for importances
    assert "changed alone, from the recipe" in text.replace("&#39;", "'")
    assert summary["digest"] in text
    # From the study alone, whatever became of the recipe.
    (root / "recipes" / "smoke.yaml").unlink()
    page.unlink()
    assert answer(root, "study", "show", "smoke")["page"] == str(page)
    assert page.read_text() == text


def test_a_ray_cluster_that_is_of_no_use_is_told_before_anything_is_done(root: Path) -> None:
    before = rows(root)
    away = f"127.0.0.1:{free_port()}"
    for address, override, message in (
        ("", "search.trials=6", "--ray needs a Ray cluster that exists, and VISIONLOOP_RAY_ADDRESS names none"),
        (away, "search.trials=6", f"no Ray cluster answers at {away}, which VISIONLOOP_RAY_ADDRESS names"),
        ("", "training.compute={launcher: ray}", "every training is there already; leave out --ray"),
        (
            away,
            "training.compute={device: auto}",
            "for processors alone, and training.compute.device is auto; set it to cpu",
        ),
    ):
        done = visionloop("tune", "-r", "smoke", "-s", override, "--ray", cwd=root, VISIONLOOP_RAY_ADDRESS=address)
        assert (done.returncode, message in done.stderr, "getting ready" in done.stderr) == (2, True, False), done.stderr
    assert rows(root) == before


@pytest.mark.slow
@pytest.mark.timeout(1800)  # Ray takes half a minute to begin with each
def test_a_search_on_a_ray_cluster_survives_its_workers(root: Path, tmp_path: Path) -> None:
    with ray_head(tmp_path / "log") as address:
        search_there(root, address)


def search_there(root: Path, address: str) -> None:
    """In processes of their own: Ray stays in the one that it was used in."""
    import psutil

    arguments = ("--study", "far", "--write", "far", "--workers", "2", "--ray", "--json")
    environment = {"VISIONLOOP_RAY_ADDRESS": address, "VISIONLOOP_NUM_THREADS": "1"}
    with tuning(root, *arguments, **environment) as process:
        assert process.stdout is not None
        killed: list[int] = []
        while process.poll() is None and not killed:
            for one in psutil.process_iter(["cmdline"]):
                ours = "flows.tuning.worker" in (one.info["cmdline"] or [])
                if ours and any("ray::" in " ".join(parent.cmdline()) for parent in one.parents()):
                    one.kill()
                    killed.append(one.pid)
                    break
            time.sleep(0.2)
        said, told = process.communicate()
    assert process.returncode == 0, told
    assert killed
    assert "2 workers on 1 of the cluster's machines" in told
    assert "its process was ended by SIGKILL" in told
    summary = json.loads(said.strip().splitlines()[-1])
    assert summary["trials"]["complete"] >= 4
    assert summary["trials"]["running"] == 0
    # A trial does not depend on who trained it.
    alone = visionloop_process("tune", "-r", "smoke", "--write", "near", "--study", "near", cwd=root, **environment)
    assert alone.returncode == 0, alone.stderr
    near = {str(row[1]): row[5] for row in rows(root, "near") if row[5]}
    far = {str(row[1]): row[5] for row in rows(root, "far") if row[5]}
    assert len(near.keys() & far.keys()) >= 3
    assert all(near[params] == far[params] for params in near.keys() & far.keys())
    wide = environment | {"VISIONLOOP_NUM_THREADS": "64"}
    large = visionloop_process("tune", "-r", "smoke", "--study", "x", "--write", "x", "--ray", cwd=root, **wide)
    assert (large.returncode, "has 64 processors for a worker" in large.stderr) == (2, True)
    assert not (root / ".visionloop" / "cache" / "ray").exists()
