"""The whole flow through the command line, on small real pictures, recorded by a real Prefect server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import psutil
import pytest
import requests
from shapes import visionloop, visionloop_process

from components.contracts.verdicts import Estimate, Measurement
from components.export import REFERENCE
from components.store import MANIFEST, Store, read_manifest
from flows.training.run import STAGES
from flows.workspace import recipes
from flows.workspace.workspace import Workspace


@pytest.fixture
def summary(trained: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((trained / "summary.json").read_text())
    return found


def ledger_kinds(root: Path) -> list[str]:
    from registry.ledger import Ledger

    return [entry.kind for entry in Ledger(f"sqlite:///{root / '.visionloop' / 'ledger.db'}").entries()]


def versions(root: Path) -> list[str]:
    from mlflow import MlflowClient

    uri = f"sqlite:///{root / '.visionloop' / 'mlflow.db'}"
    # A client without its own registry address takes the one that the process used last.
    client = MlflowClient(uri, registry_uri=uri)
    return [str(version.version) for version in client.search_model_versions("name='shapes'")]


def test_the_summary_says_what_came_of_it(summary: dict[str, Any], trained: Path) -> None:
    assert summary["outcome"] == "candidate"
    assert summary["verdict"] == "pass"
    assert summary["version"] == "1"
    assert set(summary["engines"]) == {"torch_reference-fp32", "onnxruntime-fp32", "openvino-int8"}
    for engine in summary["engines"].values():
        for metric in engine["metrics"].values():
            assert metric["low"] <= metric["value"] <= metric["high"]
            assert metric["n"] == summary["data"]["splits"]["test"] > 0
    assert {finding["gate"] for finding in summary["findings"]} >= {"accuracy", "parity", "latency", "no_regression"}
    assert ledger_kinds(trained) == ["requested"]
    assert versions(trained) == ["1"]
    # The reference serves nobody; what the others answered on corrupted images is bound and kept.
    assert set(summary["corrupted"]) == {"onnxruntime-fp32", "openvino-int8"}
    shown = summary["corrupted"]["openvino-int8"]
    assert shown["mean_accuracy"]["n"] == summary["data"]["splits"]["test"]
    assert shown["accuracy"]["clean"] == summary["engines"]["openvino-int8"]["metrics"]["accuracy"]
    bound = json.loads(visionloop("show", "1", "--json", cwd=trained).stdout)["bound"]["corrupted"]
    assert set(bound) == set(summary["corrupted"])
    kept = [path.name for path in (trained / ".visionloop" / "mlflow-artifacts").rglob("evidence/*.corrupted.parquet")]
    assert sorted(kept) == [f"{name}.corrupted.parquet" for name in sorted(bound)]


def test_pictures_that_the_network_sees_enlarged_are_told(summary: dict[str, Any]) -> None:
    from components.contracts.data import Dataset
    from components.contracts.records import Stored
    from components.store import unseal
    from flows.training.results import Results

    folder = Path(summary["run_folder"]) / "1-validation"
    body = unseal((folder / "manifest.json").read_bytes())
    assert body is not None
    dataset = Stored(Dataset.read(body["record"]), folder)

    def warnings(crop: int) -> list[str]:
        contract = SimpleNamespace(height=crop, width=crop, resize_shortest=crop + 8)
        results: Any = SimpleNamespace(
            dataset=dataset,
            splits=SimpleNamespace(record=SimpleNamespace(notes=())),
            checkpoint=SimpleNamespace(record=SimpleNamespace(preprocessing=contract)),
        )
        read: Any = Results.warnings
        found: list[str] = read.fget(results)
        return found

    kept = dataset.record.num_kept
    assert warnings(16) == summary["data"]["warnings"] == list(dataset.record.warnings)
    assert warnings(24)[-1] == (
        f"{kept} of {kept} images are smaller than the 24x24 pixels that the network sees, and are enlarged, 2.0 times in the "
        f"middle"
    )


def test_the_run_folder_shows_the_way_of_the_data(summary: dict[str, Any]) -> None:
    folder = Path(summary["run_folder"])
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    stages = [f"{i}-{stage}" for i, stage in enumerate(STAGES, 1)]
    assert names == sorted([*stages, "7-serving_check", "config.json", "report.html"])
    for name in (
        "1-validation",
        "2-splitting",
        "3-training",
        "4-export/openvino-int8",
        "5-evaluation/openvino-int8",
        "6-gating",
    ):
        assert not os.readlink(folder / name).startswith("/")
        manifest = read_manifest((folder / name).resolve())
        assert manifest["provenance"]["data_version"] == summary["data"]["version"]
        assert manifest["provenance"]["git_commit"] == summary["git_commit"]


def test_nothing_of_ours_is_pickled(trained: Path) -> None:
    forbidden = {".pkl", ".pickle", ".pth", ".pt", ".joblib", ".ckpt", ".npy"}
    ours = [trained / ".visionloop" / name for name in ("store", "cache", "runs", "mlflow-artifacts")]
    files = [path for root in ours for path in root.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert [path for path in files if path.suffix in forbidden] == []


def test_the_same_command_again_does_nothing_new(
    trained: Path, tmp_path: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.training import keys

    # The machine of these tests may have been busy when the engines were measured.
    monkeypatch.setattr(keys, "worth_measuring_again", lambda _: False)
    root = Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))
    before = {path: path.stat().st_mtime_ns for path in Store(root / ".visionloop" / "store").artefacts()}
    with mock.patch.object(recipes, "parse", wraps=recipes.parse) as parsing:
        done = visionloop("train", "-r", "smoke", "--json", cwd=root)
    assert done.returncode == 0, done.stderr
    assert parsing.call_count == 1
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert all(stage["cached"] for stage in summary["seconds"].values()), summary["seconds"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert summary["version"] == "1"
    assert versions(root) == ["1"]
    assert ledger_kinds(root) == ["requested"]


def test_a_latency_is_measured_again_when_it_was_noisy_or_on_demand(
    trained: Path, tmp_path: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.training import steps

    root = Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))
    asked: list[int] = []

    def taken(*rounds_p50_ms: float) -> None:
        def measured(engines: Any, *_: Any, **__: Any) -> list[Any]:
            asked.append(len(engines))
            common: dict[str, Any] = {
                "status": "measured",
                "machine": "m",
                "num_runs": 100,
                "latency_p99_ms": max(rounds_p50_ms),
                "latency_p99": Estimate(
                    value=max(rounds_p50_ms), low=0.5, high=9.5, n=100, method="bootstrap over rounds and runs"
                ),
            }
            return [
                Measurement(engine=e.record.name, engine_digest=e.record.digest(), rounds_p50_ms=rounds_p50_ms, **common)
                for e in engines
            ]

        monkeypatch.setattr(steps, "measure", measured)

    def train(*options: str) -> float:
        done = visionloop("train", "-r", "smoke", "--json", *options, cwd=root)
        found = json.loads(done.stdout.strip().splitlines()[-1])
        assert (done.returncode, found["version"]) == (0, "1"), done.stderr  # milliseconds make no other candidate
        return float(found["engines"]["openvino-int8"]["latency_ms"]["p99"])

    taken(1.0, 9.0)
    assert (train("--measure-again"), asked) == (9.0, [3])
    taken(2.0, 2.0)
    assert (train(), asked) == (2.0, [3, 3])  # by itself: the rounds had disagreed
    taken(7.0, 7.0)
    assert (train(), asked) == (2.0, [3, 3])
    assert (train("--measure-again"), asked) == (7.0, [3, 3, 3])


def test_a_tampered_artefact_stops_the_run_and_can_be_set_aside(trained: Path, tmp_path: Path, prefect_server: str) -> None:
    root = Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))
    victim = next((root / ".visionloop" / "store" / "training").glob("*/weights.safetensors"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    refused = visionloop("train", "-r", "smoke", cwd=root)
    assert refused.returncode == 2
    assert "weights.safetensors was changed after it was published" in refused.stderr
    assert "visionloop store verify --discard" in refused.stderr
    assert "Traceback" not in refused.stderr
    checked = visionloop("store", "verify", "--json", cwd=root)
    assert checked.returncode == 1
    assert len(json.loads(checked.stdout.strip().splitlines()[-1])["broken"]) == 1
    assert visionloop("store", "verify", "--discard", cwd=root).returncode == 0
    healed = visionloop("train", "-r", "smoke", "--json", cwd=root)
    assert healed.returncode == 0, healed.stderr
    # Trained again to the same bits, so everything after it still holds and nothing is doubled.
    assert json.loads(healed.stdout.strip().splitlines()[-1])["version"] == "1"
    assert versions(root) == ["1"]


def test_a_model_that_is_not_good_enough_is_a_rejection(trained: Path, tmp_path: Path, prefect_server: str) -> None:
    root = Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))
    strict = "gating.gates=[{gate: accuracy, settings: {floor: 0.9999}}]"
    done = visionloop("train", "-r", "smoke", "--set", strict, "--json", cwd=root)
    assert done.returncode == 1, done.stderr
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert summary["outcome"] == "rejection"
    assert "accuracy" in summary["reasons"][0]
    assert ledger_kinds(root) == ["requested", "rejected"]
    assert versions(root) == ["1"]


def test_the_served_engine_is_chosen_by_the_limits_of_the_recipe(trained: Path, tmp_path: Path, prefect_server: str) -> None:
    root = Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))
    auto = ["--set", "export.serving=auto", "--set", "export.limits.drop=0.2", "--set", "export.hourly_price=0.36"]
    done = visionloop("train", "-r", "smoke", *auto, "--set", "export.limits.memory_mb=4000", "--json", cwd=root)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    passed = {f["engine"] for f in summary["findings"] if f["engine_status"] == "pass"}
    assert passed == {"onnxruntime-fp32", "openvino-int8"}
    engines = {name: summary["engines"][name] for name in passed}
    serving = summary["serving_engine"]
    # The fastest, or a smaller one where the rounds of both overlap.
    (other,) = passed - {serving}
    is_faster = engines[serving]["latency_ms"]["p50"] < engines[other]["latency_ms"]["p50"]
    assert is_faster or engines[serving]["size_bytes"] < engines[other]["size_bytes"]
    told = {f["engine"]: f for f in summary["findings"] if f["gate"] == "serving"}
    assert told[serving]["status"] == "pass"
    assert told[serving]["message"].startswith("chosen of 2 engines that passed every gate: the ")
    for engine in engines.values():
        assert 1 < engine["memory_mb"] < 4000
        assert engine["price_of_a_million"] == pytest.approx(engine["latency_ms"]["p50"] * 0.1)
    page = Path(summary["report"]).read_text()
    assert f"{serving} (serving)</text>" in page
    assert "a million answers, one after another, at 0.36 an hour" in page
    listed = json.loads(visionloop("runs", "--json", cwd=root).stdout)["runs"]
    (run,) = [run for run in listed if run["run"] == summary["run"]]
    assert (run["engine"], run["accuracy"]) == (serving, engines[serving]["metrics"]["accuracy"])
    shown = json.loads(visionloop("show", summary["version"], "--json", cwd=root).stdout)
    limits = {"drop": 0.2, "memory_mb": 4000.0, "p99_ms": None, "size_mb": None}
    assert shown["summary"]["policy"]["limits"] == limits
    # Whoever has the version's files alone reads the same in them.
    files = root / ".visionloop" / "mlflow-artifacts"
    policy = next(p for f in files.rglob("evidence/policy.json") if "limits" in (p := json.loads(f.read_text())))
    assert policy["limits"] == limits
    card = max(files.rglob("model-card.md"), key=lambda path: path.stat().st_mtime).read_text()
    for line in ("export.limits: memory_mb 4000, drop 0.2", f"{serving}: {told[serving]['message']}"):
        assert line in card
        assert line in " ".join(policy["choice"])
    # Parity in fp32 was judged by these answers, too.
    kept = list((root / ".visionloop" / "mlflow-artifacts").rglob(f"evidence/{REFERENCE}.beyond_test.parquet"))
    evaluated = root / ".visionloop" / "runs" / summary["run"] / "5-evaluation" / REFERENCE / "beyond_test.parquet"
    assert evaluated.read_bytes() in [path.read_bytes() for path in kept]
    # No engine is that small: nothing is served, and the limit is the reason.
    refused = visionloop("train", "-r", "smoke", *auto, "--set", "export.limits.size_mb=0.001", "--json", cwd=root)
    assert refused.returncode == 1, refused.stderr
    (reason,) = json.loads(refused.stdout.strip().splitlines()[-1])["reasons"]
    assert "serving: misses the recipe's limits: size " in reason


def test_an_engine_that_cannot_be_built_and_is_not_required_costs_the_run_nothing(
    trained: Path, tmp_path: Path, prefect_server: str
) -> None:
    root = Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))
    odd = {"target": "onnxruntime", "precision": "int8", "settings": {"max_calibration_images": 10, "max_valid_images": 10}}
    odd["settings"]["min_int8_share"] = 1.0  # type: ignore[index]
    targets = [{"target": "openvino", "precision": "int8"}, {**odd, "required": False}]
    chosen = ["--set", f"export.targets={json.dumps(targets)}"]
    done = visionloop("train", "-r", "smoke", *chosen, "--json", cwd=root)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    (told,) = (f for f in summary["findings"] if f["engine"] == "onnxruntime-int8")
    assert told["engine_status"] == "not executed here"
    assert re.search(r"could not be built: ONNX Runtime executes \d+% .* int8 by name only", told["message"])
    required = visionloop(
        "train", "-r", "smoke", *chosen, "--set", "export.targets.onnxruntime-int8.required=true", cwd=root
    )
    assert required.returncode == 2
    assert "int8 by name only" in required.stderr


def test_mlflow_down_keeps_every_stage_and_the_next_run_goes_on(trained: Path, tmp_path: Path, prefect_server: str) -> None:
    root = Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))
    for name in ("ledger.db", "mlflow.db"):
        (root / ".visionloop" / name).unlink()

    def stages() -> dict[str, int]:
        store = root / ".visionloop" / "store"
        found = {path.relative_to(store).as_posix(): path.stat().st_ino for path in store.rglob("manifest.json")}
        # A noisy latency is measured again by a run that finds it, and what comes after is made anew then.
        before = ("validation/", "splitting/", "training/", "export/", "evaluation/")
        return {name: inode for name, inode in found.items() if name.startswith(before) and "-latency/" not in name}

    kept = stages()
    assert {name.partition("/")[0] for name in kept} == {"validation", "splitting", "training", "export", "evaluation"}
    away = {"PREFECT_API_URL": prefect_server, "VISIONLOOP_TRACKING_URI": "http://127.0.0.1:9"}
    refused = visionloop("train", "-r", "smoke", cwd=root, **away)
    assert refused.returncode == 2
    assert "MLflow at http://127.0.0.1:9 did not do what was asked" in refused.stderr
    assert "run the same command again" in refused.stderr
    assert ledger_kinds(root) == []
    assert stages() == kept
    done = visionloop("train", "-r", "smoke", "--json", cwd=root)
    assert done.returncode == 0, done.stderr
    assert versions(root) == ["1"]
    assert stages() == kept


def test_bad_data_stops_the_run_and_keeps_the_data_docs(workspace: Path, prefect_server: str) -> None:
    (workspace / "data" / "lonely").mkdir()
    shutil.copy(workspace / "data" / "disc" / "0000.png", workspace / "data" / "lonely" / "a.png")
    differs = visionloop("train", "-r", "smoke", cwd=workspace)
    assert differs.returncode == 2
    assert "lonely/a.png" in differs.stderr
    added = visionloop("data", "add", "--near-duplicates", "ignore", cwd=workspace)
    assert "'lonely' has 1 image: training needs at least 10" in added.stdout
    wide = "validation.max_quarantined_share=0.5"
    refused = visionloop("train", "-r", "smoke", "--set", wide, cwd=workspace)
    assert refused.returncode == 2
    assert "lonely (images 0)" in refused.stderr
    docs = next((workspace / ".visionloop" / "runs").glob("*/1-validation.failed/data_docs/index.html"))
    assert str(docs) in refused.stderr


def test_a_second_run_at_the_same_time_is_refused(workspace: Path, prefect_server: str) -> None:
    from flows.workspace.workspace import Workspace

    with Workspace.find(workspace).locked("visionloop train smoke"):
        refused = visionloop_process("train", "-r", "smoke", cwd=workspace)
        also = visionloop("data", "add", cwd=workspace)
    for done in (refused, also):
        assert done.returncode == 2
        assert f"is in use by `visionloop train smoke` (pid {os.getpid()}" in done.stderr


@pytest.mark.slow
def test_a_backbone_of_the_workspace_goes_all_the_way(trained: Path, tmp_path: Path, prefect_server: str) -> None:
    workspace = Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))
    folder = workspace / "plugins" / "backbones"
    folder.mkdir(parents=True)
    shipped = (Path(__file__).resolve().parents[2] / "components" / "backbones" / "small_cnn.py").read_text()
    (folder / "own_net.py").write_text(shipped.replace("nn.ReLU(),\n        )", "nn.Hardswish(),\n        )"))
    own = ["--set", "training.backbone=own_net", "--set", "training.fit.epochs=4"]
    done = visionloop("train", "-r", "smoke", *own, "--json", cwd=workspace)
    assert done.returncode in (0, 1), done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["engines"]["openvino-int8"]["metrics"]
    shown = visionloop("recipe", "show", "smoke", *own[:2], "--json", cwd=workspace)
    assert json.loads(shown.stdout)["training"]["backbone"] == "own_net"


def test_other_bytes_under_the_same_weights_file_are_another_training(workspace: Path, prefect_server: str) -> None:
    from flows.training.chosen import choose
    from flows.training.keys import training_key
    from flows.training.opening import opened

    splits: Any = SimpleNamespace(record=SimpleNamespace(digest=lambda: "splits"))
    keys = []
    for content in (b"some", b"some", b"other"):
        (workspace / "start.safetensors").write_bytes(content)
        recipe = choose("smoke", Workspace.find(workspace), ["training.weights=start.safetensors"])
        with opened(recipe, "manual", requested_by="", quiet=True) as run:
            keys.append(training_key(run, splits))
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.slow
def test_other_bytes_under_the_same_weights_file_train_anew(workspace: Path, prefect_server: str) -> None:
    import torch
    from safetensors.torch import save_file

    from components import plugins

    settings = {"image_size": 16, "width": 8, "embedding_dim": 16}
    digests = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        save_file(plugins.load("backbones", "small_cnn", settings).build().state_dict(), workspace / "start.safetensors")
        local = ["--set", "training.weights=start.safetensors", "--set", "training.fit.epochs=1"]
        local += ["--set", "export.targets=[{target: onnxruntime}]", "--set", "export.serving=onnxruntime-fp32"]
        done = visionloop("train", "-r", "smoke", *local, "--json", cwd=workspace)
        assert done.returncode in (0, 1), done.stderr
        digests.append(json.loads(done.stdout.strip().splitlines()[-1])["candidate_digest"])
    assert digests[0] != digests[1]
    save_file({"other": torch.zeros(3)}, workspace / "start.safetensors")
    refused = visionloop("train", "-r", "smoke", *local, cwd=workspace)
    assert refused.returncode == 2
    assert "start.safetensors does not fit backbone 'small_cnn'" in refused.stderr


def test_a_lost_ledger_stops_the_run(trained: Path, tmp_path: Path, prefect_server: str) -> None:
    root = Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))
    (root / ".visionloop" / "ledger.db").unlink()
    refused = visionloop("train", "-r", "smoke", cwd=root)
    assert refused.returncode == 2
    assert "A lost ledger proves nothing about a champion" in refused.stderr


def started(root: Path, api: str, stderr: int) -> subprocess.Popen[bytes]:
    """The run in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "flows", "train", "-r", "smoke"],
        cwd=root,
        env={**os.environ, "PREFECT_API_URL": api},
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        start_new_session=True,
    )


def start_and_kill(root: Path, api: str, stage: str) -> None:
    """Start the run and kill -9 its process group when it announces `stage`; in training, once two epochs are saved."""
    process = started(root, api, subprocess.PIPE)
    assert process.stderr is not None
    number = STAGES.index(stage) + 1
    for line in process.stderr:
        if line.decode().startswith(f"[{number}/{len(STAGES)}]"):
            break
    if stage == "training":
        partial = root / ".visionloop" / "store" / ".partial"
        deadline = time.monotonic() + 60
        while not list(partial.glob("training-*/state-1-00002*")):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()


@pytest.mark.parametrize(
    ("stage", "number", "to_all"),
    [
        ("training", signal.SIGINT, True),  # the terminal's Ctrl-C reaches the whole group
        pytest.param("export", signal.SIGTERM, False, marks=pytest.mark.slow),
        pytest.param("validation", signal.SIGHUP, False, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_says_where_and_leaves_nothing_behind(
    workspace: Path, prefect_server: str, stage: str, number: signal.Signals, to_all: bool
) -> None:
    process = started(workspace, prefect_server, subprocess.PIPE)
    assert process.stderr is not None
    place = f"{STAGES.index(stage) + 1}/{len(STAGES)}"
    for line in process.stderr:
        if line.decode().startswith(f"[{place}]"):
            break
    family = psutil.Process(process.pid).children(recursive=True)
    (os.killpg if to_all else os.kill)(process.pid, number)
    told = process.stderr.read().decode().splitlines()
    assert process.wait(30) == 128 + number
    process.stderr.close()
    assert told[-1].startswith(f"stopped at stage {place.replace('/', ' of ')} ({stage}")
    assert not any(line.startswith(("error", "Traceback")) for line in told)
    psutil.wait_procs(family, timeout=10)
    assert not any(child.is_running() for child in family)
    with Workspace.find(workspace).locked("a test"):
        check_whole(workspace)
    ended = {"state": {"type": {"any_": ["CRASHED"]}}}  # other tests left scheduled runs, which have no time of their start
    query = {"sort": "START_TIME_DESC", "limit": 1, "flow_runs": ended}
    (run,) = requests.post(f"{prefect_server}/flow_runs/filter", json=query, timeout=10).json()
    assert (run["state"]["type"], run["state"]["message"]) == ("CRASHED", told[-1])


def test_a_command_that_does_not_come_to_an_end_is_ended_by_the_second_ctrl_c() -> None:
    code = (
        "import subprocess, sys, time\nfrom flows import stopping\nstopping.watch()\n"
        "child = subprocess.Popen(['sleep', '600'], process_group=0)\n"
        "try:\n    print(child.pid, flush=True)\n    time.sleep(600)\n"
        "finally:\n    print('unwinding', flush=True)\n    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "unwinding\n"
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=30)[1], process.returncode) == ("stopped by Ctrl-C\n", 130)
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(("number", "told"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_command_that_is_still_being_imported_is_stopped_with_one_line(
    number: signal.Signals, told: str, tmp_path: Path
) -> None:
    """A library that takes for ever to be imported stands for any moment of the first second."""
    (tmp_path / "typer.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)\n")
    code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nfrom flows.cli import main\nmain()"
    command = [sys.executable, "-c", code, "train", "x"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    assert (process.communicate(timeout=30)[1], process.returncode) == (f"stopped by {told}\n", 128 + number)


def check_whole(root: Path) -> None:
    """Whatever is in the store is whole."""
    for manifest in Store(root / ".visionloop" / "store").artefacts():
        assert (manifest / MANIFEST).exists()
        read_manifest(manifest)


def finish_and_compare(root: Path, api: str, whole: dict[str, Any]) -> None:
    check_whole(root)
    done = visionloop("train", "-r", "smoke", "--json", cwd=root)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert summary["candidate_digest"] == whole["candidate_digest"]
    assert summary["version"] == "1"
    assert versions(root) == ["1"]
    assert ledger_kinds(root) == ["requested"]
    assert list((root / ".visionloop" / "store" / ".partial").iterdir()) == []


@pytest.mark.slow
def test_a_run_killed_in_registration_registers_once(
    trained: Path, tmp_path: Path, summary: dict[str, Any], prefect_server: str
) -> None:
    root = Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))
    for name in ("ledger.db", "mlflow.db"):
        (root / ".visionloop" / name).unlink()
    start_and_kill(root, prefect_server, "registration")
    finish_and_compare(root, prefect_server, summary)


@pytest.mark.slow
def test_a_run_killed_at_every_stage_ends_like_one_that_was_not(
    workspace: Path, summary: dict[str, Any], prefect_server: str
) -> None:
    """Each time it goes on from the stage it was killed in: that stage ends before the next one is announced."""
    for number, stage in enumerate(STAGES):
        start_and_kill(workspace, prefect_server, stage)
        check_whole(workspace)
        done = {folder.name for folder in (workspace / ".visionloop" / "store").glob("*")}
        assert set(STAGES[:number]) <= done, (stage, done)
    finish_and_compare(workspace, prefect_server, summary)


@pytest.mark.slow
def test_a_run_killed_over_and_over_at_random_ends_like_one_that_was_not(
    workspace: Path, summary: dict[str, Any], prefect_server: str
) -> None:
    import random

    rng = random.Random(20261122)
    for _ in range(8):
        process = started(workspace, prefect_server, subprocess.DEVNULL)
        time.sleep(rng.uniform(3, 25))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finish_and_compare(workspace, prefect_server, summary)
