from __future__ import annotations

import datetime
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from shapes import visionloop, visionloop_process, write_pictures


def test_help_reads_like_a_tour_of_the_loop() -> None:
    text = visionloop("--help", cwd=Path.cwd()).stdout
    places = [text.index(f"visionloop {step}") for step in ("init", "data add", "train", "runs")]
    assert places == sorted(places)


def test_from_nothing_to_a_pinned_version(tmp_path: Path) -> None:
    made = visionloop("init", str(tmp_path / "ws"), "--json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout.strip().splitlines()[-1]) == {
        "workspace": str(tmp_path / "ws"),
        "repository": str(tmp_path / "ws"),
    }
    write_pictures(tmp_path / "photos", 12)
    Image.new("L", (8, 8)).save(tmp_path / "photos" / "disc" / "moving.jpg", "GIF")
    Image.new("L", (30, 40)).save(tmp_path / "photos" / "disc" / "large.bmp")
    none = visionloop("data", "add", "../photos", cwd=tmp_path / "ws", VISIONLOOP_FORMATS="WebP")
    assert none.returncode == 2
    assert "of 38 files none is a picture that is accepted" in none.stderr
    added = visionloop("data", "add", "../photos", "--json", cwd=tmp_path / "ws", VISIONLOOP_MAX_PIXELS="1000")
    answer = json.loads(added.stdout.strip().splitlines()[-1])
    assert (answer["files"], answer["copied"], len(answer["notes"])) == (36, 36, 2)
    assert answer["refused"] == {
        "disc/large.bmp": "30x40 pixels, accepted are up to 1000; make it smaller",
        "disc/moving.jpg": "a GIF, which is not an accepted format (JPEG, PNG, WebP, BMP, PPM, TIFF); convert it to JPEG or PNG",
    }
    # What is pinned stays; what a person put there is new and has to pass.
    assert visionloop("data", "add", cwd=tmp_path / "ws", VISIONLOOP_FORMATS="WebP").returncode == 0
    shutil.copy(tmp_path / "photos" / "disc" / "large.bmp", tmp_path / "ws" / "data" / "disc")
    by_hand = visionloop("data", "add", cwd=tmp_path / "ws", VISIONLOOP_MAX_PIXELS="1000")
    assert (by_hand.returncode, "1 new picture" in by_hand.stderr) == (2, True)
    (tmp_path / "ws" / "data" / "disc" / "large.bmp").unlink()
    assert answer["new_test_images"] in range(5, 10)
    staged = subprocess.run(
        ["git", "diff", "--cached", "--name-only"], cwd=tmp_path / "ws", capture_output=True, text=True, check=True
    )
    assert {"data.dvc", "data.test-ledger.csv", ".gitignore", ".dvc/config"} <= set(staged.stdout.split())
    assert visionloop("data", "status", cwd=tmp_path / "ws").returncode == 0
    (tmp_path / "ws" / "data" / "disc" / "0000.png").unlink()
    changed = visionloop("data", "status", "--json", cwd=tmp_path / "ws")
    assert changed.returncode == 1
    assert json.loads(changed.stdout.strip().splitlines()[-1])["changes"] == {"deleted": ["data/disc/0000.png"]}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("VISIONLOOP_FORMATS", "jpeg,gif", "unknown format in VISIONLOOP_FORMATS 'gif'; valid: BMP, JPEG"),
        ("VISIONLOOP_MAX_PIXELS", "1e6", "VISIONLOOP_MAX_PIXELS is '1e6'; expected a whole number from 1 to"),
        ("VISIONLOOP_MAX_IMAGE_MB", "9999", "VISIONLOOP_MAX_IMAGE_MB is '9999'; expected a whole number from 1 to 256"),
    ],
)
def test_a_wrong_bound_on_pictures_is_an_error(workspace: Path, name: str, value: str, message: str) -> None:
    done = visionloop("data", "add", cwd=workspace, **{name: value})
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr


def test_whatever_surrounds_a_workspace_it_keeps_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd characters in its path, a hook's environment, ignore rules of others, a repository around it."""
    from components.dataversions import verify
    from flows.workspace.settings import read_settings
    from registry.ledger import Ledger

    outer = tmp_path / "a?b#c%d$HOME {x} \u00e9"
    outer.mkdir()
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "attributes").write_text("* text=auto eol=crlf\n")
    (tmp_path / "settings" / "config").write_text(
        f"[core]\nautocrlf = true\nsafecrlf = true\nattributesFile = {tmp_path}/settings/attributes\n"
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "settings" / "config"))
    subprocess.run(["git", "init", "--quiet"], cwd=outer, check=True)
    (outer / ".git" / "info").mkdir(exist_ok=True)
    (outer / ".git" / "info" / "exclude").write_text("*.csv\n*.dvc\n")
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    made = visionloop("init", "ws", "--json", cwd=outer)
    assert json.loads(made.stdout)["repository"] == str(outer)
    write_pictures(tmp_path / "photos", 12)
    for name in ("Thumbs.db", ".hidden", "notes.txt"):
        (tmp_path / "photos" / "disc" / name).write_text("no image")
    (tmp_path / "photos" / "disc" / "broken.png").symlink_to("nowhere")
    (tmp_path / "photos" / "disc" / "0000.PNG").write_bytes((tmp_path / "photos" / "disc" / "0001.png").read_bytes())
    answer = json.loads(visionloop("data", "add", str(tmp_path / "photos"), "--json", cwd=outer / "ws").stdout)
    assert answer["found"] == answer["copied"] + answer["already_there"] + len(answer["left_out"]) == 41
    assert {entry["file"] for entry in answer["left_out"]} == {
        f"disc/{n}" for n in ("Thumbs.db", ".hidden", "notes.txt", "broken.png")
    }
    verify(outer / "ws")
    Ledger(read_settings(outer / "ws" / ".visionloop").ledger_url).entries()
    listed = subprocess.run(["git", "ls-files"], cwd=outer / "ws", capture_output=True, text=True, check=True).stdout.split()
    assert {"data.dvc", "data.test-ledger.csv", ".dvc/config"} <= set(listed)
    added = subprocess.run(["git", "add", "--all"], cwd=outer, check=False, capture_output=True, text=True)
    assert added.returncode == 0, added.stderr
    assert {path.name for path in tmp_path.iterdir()} == {outer.name, "photos", "settings"}
    assert (outer / "ws" / ".visionloop" / "ledger.db").is_file()


def test_making_a_workspace_twice_changes_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        assert visionloop("init", "ws", cwd=tmp_path).returncode == 0
    assert (tmp_path / "ws" / ".gitignore").read_text().count(".visionloop") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "-r", "nothing"], "unknown recipe 'nothing'; valid: cifar10, digits, "),
        (["train", "-r", "smoke", "--set", "training.backbone=vgg"], "unknown backbone 'vgg'; valid:"),
        (["train", "-r", "smoke", "--set", "export.targets=[{target: onnx}]"], "serving names"),
        (["train", "-r", "smoke", "--set", "gating.gates=[{gate: luck}]"], "unknown gate 'luck'; valid:"),
        (["data", "add", "nowhere"], "nowhere is not there"),
        (["data", "add", "x", "--source", "digits"], "source 'digits' takes nothing by position"),
        (["recipe", "show", "nothing"], "unknown recipe"),
    ],
)
def test_a_wrong_call_is_an_error_that_says_what_to_do(workspace: Path, arguments: list[str], message: str) -> None:
    plain = visionloop(*arguments, cwd=workspace)
    assert plain.returncode == 2
    assert plain.stderr.splitlines()[-1].startswith("error: ")
    assert message in plain.stderr
    as_json = visionloop(*arguments, "--json", cwd=workspace)
    assert as_json.returncode == 2
    assert message in json.loads(as_json.stdout.strip().splitlines()[-1])["message"]


def test_what_is_of_a_source_alone_is_refused_beside_from_predictions(tmp_path: Path) -> None:
    for beside, message in (
        (["photos"], "give a SOURCE or --from-predictions"),
        (["--source", "digits"], "give a SOURCE or --from-predictions"),
        (["--test-share", "0.3"], "are not of --from-predictions"),
        (["--near-duplicates", "ignore"], "are not of --from-predictions"),
        (["--near-duplicates", "refuse"], "are not of --from-predictions"),  # what `data add` does by itself elsewhere
        (["--max-cluster-share", "0.2"], "are not of --from-predictions"),
        (["--max-cluster-share", "0.05"], "are not of --from-predictions"),
        (["--keep-splits"], "are of a folder or a source that is split"),
        (["--merge-splits"], "are of a folder or a source that is split"),
        (["--source-setting", "dataset=CIFAR10"], "is of a source"),
    ):
        done = visionloop("data", "add", "--from-predictions", "smoke", *beside, cwd=tmp_path)
        assert (done.returncode, message in done.stderr) == (2, True), (beside, done.stderr)


def test_outside_a_workspace_every_command_says_how_to_make_one(tmp_path: Path) -> None:
    for arguments in (["train", "-r", "digits"], ["data", "status"], ["runs"], ["store", "verify"]):
        done = visionloop(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert "visionloop init" in done.stderr


def test_a_process_of_its_own_prints_no_traceback(tmp_path: Path) -> None:
    done = visionloop_process("train", "-r", "digits", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_training_says_at_once_that_it_begins_before_what_takes_long_is_loaded(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flows.train", None)  # what loads it fails from here on
    told = visionloop("train", "-r", "smoke", cwd=workspace).stderr.splitlines()
    assert told[0].startswith("getting ready to train by recipe smoke")
    assert "flows.train" in told[1]
    assert "getting ready" not in visionloop("train", "-r", "smoke", "--json", cwd=workspace).stderr


def test_recipes_are_listed_shown_and_described_by_a_schema(workspace: Path) -> None:
    written = (workspace / "recipes" / "smoke.yaml").read_text()
    mistaken = written.replace("settings: {floor: 0.6}", "settings: {flor: 0.6}")
    assert mistaken != written
    (workspace / "recipes" / "mistaken.yaml").write_text(mistaken)
    listed = json.loads(visionloop("recipe", "list", "--json", cwd=workspace).stdout)
    assert {"digits", "transfer", "smoke"} <= set(listed["recipes"])
    assert "mistaken" not in listed["recipes"]
    assert "flor" in listed["problems"]["mistaken"]
    shown = json.loads(visionloop("recipe", "show", "smoke", "--json", cwd=workspace).stdout)
    assert shown["training"]["fit"]["epochs"] == 6
    assert shown["training"]["fit"]["weight_decay"] == 0.01
    schema = json.loads(visionloop("recipe", "schema", "--json", cwd=workspace).stdout)
    assert "training" in schema["required"]


def test_runs_are_listed_with_what_came_of_them(trained: Path) -> None:
    (run,) = json.loads(visionloop("runs", "--json", cwd=trained).stdout)["runs"]
    assert (run["outcome"], run["version"]) == ("candidate", "1")
    assert run["accuracy"]["n"] == 54
    assert datetime.datetime.fromisoformat(run["started"]).utcoffset() == datetime.timedelta(0)
    assert run["set"] == []
    text = visionloop("runs", cwd=trained).stdout
    assert f"n={run['accuracy']['n']} ({run['engine']})" in text
    assert " UTC  smoke-" in text
    assert visionloop("--version", cwd=trained).stdout == "visionloop 0.1.0\n"


def test_an_intact_store_verifies(trained: Path) -> None:
    done = visionloop("store", "verify", "--json", cwd=trained)
    answer = json.loads(done.stdout)
    assert done.returncode == 0
    assert answer["intact"] >= 12
    assert answer["broken"] == []


def test_the_embedded_digits_hash_to_the_committed_pin(tmp_path: Path) -> None:
    from components import dataversions, git
    from flows.demo.workspace import prepare
    from flows.workspace.data import ensure

    workspace = prepare(tmp_path / "demo")
    version = ensure(workspace, "digits")
    assert version.num_files == 4000
    assert version == dataversions.pinned(Path(__file__).resolve().parents[2])
    assert git.state(workspace.root)[1] is False


@pytest.mark.slow
def test_the_world_outside_the_digits_shares_no_image_with_them(tmp_path: Path) -> None:
    from components.sources.digits import Source

    Source().fetch(out=tmp_path / "in")
    Source().fetch_world(out=tmp_path / "out")
    inside = {path.read_bytes() for path in (tmp_path / "in").rglob("*.bmp")}
    outside = {path.read_bytes() for path in (tmp_path / "out").rglob("*.bmp")}
    assert (len(inside), len(outside), len(inside & outside)) == (4000, 1000, 0)


def test_the_module_runs_as_visionloop(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows", "--help"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "visionloop train" in done.stdout


def test_the_demo_never_overwrites_the_pin_of_another_workspace(workspace: Path) -> None:
    from components.contracts.errors import ConfigError
    from flows.demo.workspace import prepare

    before = [(workspace / name).read_bytes() for name in ("data.dvc", "data.test-ledger.csv")]
    with pytest.raises(ConfigError, match="began with other data than this demo's"):
        prepare(workspace)
    assert [(workspace / name).read_bytes() for name in ("data.dvc", "data.test-ledger.csv")] == before
