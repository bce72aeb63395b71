"""A class that gets another name: pinned with the data, whatever kills it, and no reason to lose the champion's comparison."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from shapes import LENIENT, visionloop

from components import dataversions, git, plugins
from components.companions import TEST_LEDGER
from components.contracts.data import DataVersion, names_after
from components.contracts.errors import VisionloopError
from components.contracts.families import Backbone
from components.contracts.models import Checkpoint
from components.contracts.records import FileDigest, Stored
from components.images import decode, pixel_digest
from components.splitting import TestLedger
from components.store import seal
from components.training import TrainingConfig
from flows.training.given_models import GivenModel, keep, warm_start
from flows.workspace.renaming import names_of_today, rename_class
from flows.workspace.workspace import Workspace


def told(*arguments: str, cwd: Path, status: int = 0) -> dict[str, Any]:
    done = visionloop(*arguments, "--json", cwd=cwd)
    assert done.returncode == status, (done.stdout, done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_a_renamed_class_and_a_relabelled_test_picture_are_judged_for_both_models(root: Path) -> None:
    members = TestLedger.read(root / TEST_LEDGER).members
    assert told("data", "rename-class", "disc", "circle", cwd=root)["files"] == 60
    moved = next(
        path
        for path in sorted((root / "data" / "circle").iterdir())
        if members[pixel_digest(decode(path.read_bytes()))[:32]]
    )
    moved.rename(root / "data" / "cross" / f"was-{moved.name}")
    assert "1 frozen test picture relabelled" in told("data", "add", cwd=root)["notes"][0]
    summary = told("train", "-r", "smoke", "--set", f"gating.gates={LENIENT}", cwd=root)
    (finding,) = [
        one for one in summary["findings"] if (one["gate"], one["engine"]) == ("no_regression", summary["serving_engine"])
    ]
    assert finding["n"] == sum(members.values())
    assert "both know" not in finding["message"]
    folder = Path(summary["run_folder"]) / "5-evaluation" / "champion"
    champion = json.loads((folder / "manifest.json").read_text())["record"]
    assert [one["name"] for one in champion["per_class"]] == ["circle", "cross", "stripes"]
    # The champion, which learned a disc there, is wrong on the picture that is called a cross now, and on few others.
    answers = pd.read_parquet(folder / "predictions.parquet").set_index("path")
    relabelled = answers.loc[f"cross/was-{moved.name}"]
    assert (relabelled["label"], relabelled["predicted"], relabelled["right"]) == ("cross", "circle", False)
    assert champion["metrics"]["accuracy"]["value"] > 0.8
    report = Path(summary["report"]).read_text()
    assert "is called &#39;circle&#39; now, and both are compared on it" in report
    assert (
        "1 frozen test picture relabelled since the data of the champion (version 1), and both are judged by the new "
        in (report)
    )
    assert f"cross/was-{moved.name} (circle, now cross)" in report
    if summary["version"]:
        assert any("relabelled since" in note for note in told("show", summary["version"], cwd=root)["notes"])


class OneChampion:
    """As much of a registry as a warm start asks."""

    def __init__(self, checkpoint: Checkpoint, data: DataVersion) -> None:
        self.found = Stored(checkpoint, Path()), data

    def champion(self, _: str) -> Any:
        return SimpleNamespace(body={"version": "3"})

    def fetch_checkpoint(self, *_: Any, **__: Any) -> tuple[Stored[Checkpoint], DataVersion]:
        return self.found


def test_a_warm_start_knows_and_keeps_which_classes_were_renamed_since(tmp_path: Path) -> None:
    config = TrainingConfig(backbone="small_cnn", weights="champion")
    backbone: Backbone = plugins.load("backbones", "small_cnn", {})
    file = FileDigest(name="w", sha256="0" * 64, bytes=1)
    checkpoint = Checkpoint(
        splits_digest="s",
        task="classification",
        task_settings={},
        backbone="small_cnn",
        backbone_settings={},
        preprocessing=backbone.preprocessing,
        classes=("cross", "disc"),
        embedding_dim=backbone.embedding_dim,
        weights=file,
        history=file,
        temperature=1.0,
        best_epoch=1,
        epochs=1,
        valid_metrics={},
    )

    def version(*renames: tuple[str, str]) -> DataVersion:
        return DataVersion(dvc_hash="h", num_files=1, bytes=1, ledger_sha256="l", renamed=renames)

    before = ("box", "disc")
    registry: Any = OneChampion(checkpoint, version(before))

    def begun(*renames: tuple[str, str]) -> GivenModel:
        return warm_start("m", config, version(*renames), registry, run=tmp_path, cache=tmp_path)

    assert begun(before).renamed == ()
    start = begun(before, ("disc", "circle"))
    assert start.renamed == (("disc", "circle"),)
    keep(start, tmp_path)
    again = begun(before, ("disc", "circle"))
    assert (again.version, again.weights, again.renamed) == (start.version, start.weights, start.renamed)
    assert again.fetch().record == checkpoint
    # What a run kept before classes could be renamed.
    (tmp_path / "warm_start.json").write_bytes(seal({"version": "3", "weights": "0" * 64}))
    assert begun(before).renamed == ()


def test_names_follow_renames_one_after_the_other() -> None:
    swapped = (("a", "b "), ("b", "a"), ("b ", "b"))
    assert names_after(("a", "b", "c"), swapped) == ("b", "a", "c")
    assert names_after(("a", "c"), (("a", "x"), ("x", "y"), ("y", "a"))) == ("a", "c")
    assert names_after(("a", "x"), (("a", "x"),)) == ("a", "x")  # two classes stay two

    def version(*renames: tuple[str, str]) -> DataVersion:
        return DataVersion(dvc_hash="h", num_files=1, bytes=1, ledger_sha256="l", renamed=renames)

    assert version(*swapped).renames_since(version(swapped[0])) == swapped[1:]
    assert version(*swapped).renames_since(version(*swapped)) == ()
    assert version().renames_since(version(*swapped)) == ()
    assert version(("a", "x"), ("c", "d")).renames_since(version(("a", "y"))) == (("a", "x"), ("c", "d"))
    # A version without renames is written as ever, so that what is keyed by it stays found.
    assert version().to_json() == {"schema_version": 1, "dvc_hash": "h", "num_files": 1, "bytes": 1, "ledger_sha256": "l"}
    assert DataVersion.read(version(*swapped).to_json()) == version(*swapped)


def test_what_labels_call_by_an_old_name_goes_to_the_class_of_today(workspace: Path) -> None:
    found = Workspace.find(workspace)
    rename_class(found, "disc", "circle")
    rename_class(found, "circle", "round")
    assert list(map(names_of_today(found), ("disc", "cross", "none", "circle"))) == ["round", "cross", "none", "round"]
    (workspace / "data" / "disc").mkdir()  # a new class that got the old name
    assert names_of_today(found)("disc") == "disc"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("disc", "disc", "is its name already"),
        ("disc", "cross", "is a class already. To make one class of two"),
        ("disc", "Cross", "differs from the class 'cross' only in how it is written"),
        ("disc", "a/b", "cannot be the name of a class"),
        ("disc", "../up", "cannot be the name of a class"),
        ("disc", ".hidden", "cannot be the name of a class"),
        ("disc", "x" * 256, "cannot be the name of a class"),
        ("disc", "notes", "is there and is no class"),
        ("ring", "circle", "unknown class 'ring'; valid: cross, disc, stripes"),
        ("", "circle", "unknown class ''"),
    ],
)
def test_names_that_cannot_be_are_refused_and_nothing_is_changed(workspace: Path, old: str, new: str, words: str) -> None:
    (workspace / "data" / "notes").mkdir()
    (workspace / "data" / "notes" / "Thumbs.db").write_bytes(b"")  # which versions leave out
    version = dataversions.pinned(workspace)
    with pytest.raises(VisionloopError, match=words.replace("(", r"\(")):
        rename_class(Workspace.find(workspace), old, new)
    assert dataversions.verify(workspace) == version


def test_a_rename_takes_no_other_change_into_the_version(workspace: Path) -> None:
    (workspace / "data" / "disc" / "0000.png").rename(workspace / "data" / "cross" / "moved.png")
    with pytest.raises(VisionloopError, match="1 relabelled"):
        rename_class(Workspace.find(workspace), "disc", "circle")
    (workspace / "data" / "disc").rename(workspace / "data" / "circle")
    with pytest.raises(VisionloopError, match="differs from the pinned version by more than the rename of 'disc'"):
        rename_class(Workspace.find(workspace), "disc", "circle")


_PLACES = {
    "rename": "flows.workspace.renaming.os.rename",
    "pin": "components.dataversions.pin",
    "write": "components.store.os.replace",
    "stage": "components.git.stage",
}


@pytest.mark.parametrize("victim", list(_PLACES))
def test_a_rename_that_is_killed_is_completed_by_running_it_again(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    found, before = Workspace.find(workspace), dataversions.pinned(workspace)
    with monkeypatch.context() as patched:
        patched.setattr(_PLACES[victim], killed)
        patched.setattr(Path, "unlink", lambda *_, **__: None)  # who is killed cleans nothing up
        with pytest.raises(Killed):
            rename_class(found, "disc", "circle")
    unfinished = [*workspace.glob(".data.dvc.*.tmp"), workspace / ".dvc" / f".config.local.{'a' * 32}.tmp"]
    assert len(unfinished) == 1 + (victim == "write")
    unfinished[-1].touch()
    os.utime(unfinished[-1], (0, 0))
    if victim == "pin":
        (note,) = told("data", "status", cwd=workspace, status=1)["notes"]
        assert "say so by `visionloop data rename-class disc circle`" in note
    done = rename_class(found, "disc", "circle")
    assert (done.num_files, done.version.renamed) == (60, (("disc", "circle"),))
    assert git.run(workspace, "diff", "--", "data.dvc") == ""
    assert "tmp" not in git.run(workspace, "status", "--porcelain", "--untracked-files=all")
    again = rename_class(found, "disc", "circle")
    assert (again.was_done, again.version) == (True, done.version)
    found_changes = told("data", "diff", "HEAD", "pinned", cwd=workspace, status=1)
    assert found_changes["renamed_classes"] == [{"old": "disc", "new": "circle", "files": 60, "recorded": True}]
    assert (found_changes["relabelled"], found_changes["added"]) == ([], [])
    back = told("data", "diff", "pinned", "HEAD", cwd=workspace, status=1)["renamed_classes"]
    assert [(one["old"], one["new"], one["recorded"]) for one in back] == [("circle", "disc", True)]
    assert done.version.ledger_sha256 == before.ledger_sha256
