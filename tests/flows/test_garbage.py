from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from shapes import FEW, visionloop

from components.store import MANIFEST, Store, describe, seal, unseal
from flows.workspace.workspace import Workspace


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    """A workspace in which a candidate was trained, which waits for a person."""
    return Path(shutil.copytree(trained, tmp_path / "workspace", symlinks=True))


def answer(root: Path, *arguments: str) -> dict[str, Any]:
    done = visionloop("store", "gc", *arguments, "--json", cwd=root)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def removed(found: dict[str, Any], root: Path) -> dict[str, set[str]]:
    by_kind: dict[str, set[str]] = {}
    for each in found["removed"]:
        by_kind.setdefault(each["kind"], set()).add(Path(each["folder"]).relative_to(root / ".visionloop").as_posix())
    return by_kind


def size_of(root: Path, *places: str) -> int:
    found = (path for place in places for path in (root / ".visionloop" / place).rglob("*"))
    return sum(path.stat().st_size for path in found if path.is_file() and not path.is_symlink())


def test_what_nothing_reaches_goes_and_a_run_finds_the_rest(root: Path) -> None:
    state = root / ".visionloop"
    (champion,) = (path.name for path in (state / "runs").iterdir())
    store = Store(state / "store")
    before = {path.relative_to(state).as_posix() for path in store.artefacts()}
    # A run that was stopped before any row of the ledger, and one after it that is the last.
    for number, moment in ((1, "2099-01-01T00:00:00+00:00"), (2, "2099-01-02T00:00:00+00:00")):
        folder = state / "runs" / f"smoke-stopped-{number}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"run": {}, "config": {}, "set": [], "started": moment}))
    (training,) = (state / "store" / "training").iterdir()
    orphan, linked = (training.with_name(letter * 32) for letter in "ab")
    for copy, epochs in ((orphan, 97), (linked, 98)):
        # Another training than any that the ledger names, that a run left.
        _copied(training, copy, epochs)
    (state / "runs" / "smoke-stopped-1" / "3-training").symlink_to(
        os.path.relpath(orphan, state / "runs" / "smoke-stopped-1")
    )
    (state / "runs" / "smoke-stopped-2" / "3-training").symlink_to(
        os.path.relpath(linked, state / "runs" / "smoke-stopped-2")
    )
    partial, resumable = (state / "store" / ".partial" / f"training-{name}" for name in ("old", "new"))
    cache, used = (state / "cache" / "maps" / "part" / name for name in ("view", "used"))
    for folder, name in ((partial, "progress"), (resumable, "progress"), (cache, "0.safetensors"), (used, "0.safetensors")):
        folder.mkdir(parents=True)
        (folder / name).write_bytes(bytes(5000))
    # What validation and training kept; it is older than the last run too.
    for name in ("pictures", "duplicates"):
        shutil.rmtree(state / "cache" / name)
    # After the last run started.
    os.utime(resumable / "progress", (2**32, 2**32))
    os.utime(used, (2**32, 2**32))
    downloads = state / "cache" / "downloads"
    downloads.mkdir(exist_ok=True)
    (downloads / "weights.pth").write_bytes(bytes(5000))
    expected = {
        "run": {"runs/smoke-stopped-1"},
        "artefact": {f"store/training/{'a' * 32}"},
        "unfinished": {"store/.partial/training-old"},
        "cache": {"cache/maps/part/view"},
    }
    told = answer(root, "--dry-run", "--keep-runs", "1")
    assert removed(told, root) == expected
    assert told["kept_runs"] == sorted([champion, "smoke-stopped-2"])
    assert cache.exists()
    assert orphan.exists()

    with Workspace.find(root).locked("visionloop train smoke"):
        beside = visionloop("store", "gc", cwd=root)
    assert beside.returncode == 2
    assert "is in use by `visionloop train smoke`" in beside.stderr
    assert orphan.exists()

    done = answer(root, "--keep-runs", "1")
    assert removed(done, root) == expected
    assert (told["before_bytes"], told["after_bytes"]) == (done["before_bytes"], done["after_bytes"])
    assert done["after_bytes"] == size_of(root, "runs", "store", "cache/maps")
    assert {path.relative_to(state).as_posix() for path in store.artefacts()} == before | {f"store/training/{'b' * 32}"}
    assert not cache.exists()
    assert used.exists()
    assert resumable.exists()
    assert (downloads / "weights.pth").exists()
    assert answer(root, "--keep-runs", "1")["removed"] == []

    again = visionloop("train", "-r", "smoke", "--json", cwd=root)
    assert again.returncode == 0, again.stderr
    assert "training: unchanged, from the store" in again.stderr
    assert "packaging: unchanged, from the store" in again.stderr


def test_what_the_ledger_names_stays_when_its_run_folder_is_gone_and_what_is_lost_is_made_anew(
    root: Path, tmp_path: Path
) -> None:
    state = root / ".visionloop"
    before = set(Store(state / "store").artefacts())
    shutil.rmtree(state / "runs")
    kept = before - {Path(each["folder"]) for each in answer(root)["removed"]}
    # By digests: the data, the weights, the engines, the evidence and the release, and what they were made from.
    kinds = {path.relative_to(state / "store").parts[0] for path in kept}
    assert kinds >= {"validation", "splitting", "training", "export", "evaluation", "packaging"}
    again = visionloop("train", "-r", "smoke", "--json", cwd=root)
    assert again.returncode == 0, again.stderr
    # Latencies are measured again, and a gate's verdict holds them; all else has the key and the candidate of before.
    assert {path for path in Store(state / "store").artefacts() if path.parent.name != "gating"} == {
        path for path in before if path.parent.name != "gating"
    }
    assert json.loads(again.stdout)["version"] == "1"

    # A version that waits for an exception, or rests on one, is as any other, whatever ran since: here with its own release.
    asked = ("train", "-r", "smoke", "--set", FEW, "--set", "packaging.golden_images=8", "--as", "Ann", "--json")
    undecided = json.loads(visionloop(*asked, cwd=root).stdout)
    assert (undecided["version"], undecided["undecided"]) == ("2", ["class_recall"])
    run = Path(undecided["run_folder"])
    linked = {path.resolve() for path in run.rglob("*") if path.is_symlink()}
    (release,) = (path for path in linked if path.parent.name == "packaging")
    later = state / "runs" / "smoke-later"
    later.mkdir()
    started = "2099-01-01T00:00:00+00:00"
    (later / "config.json").write_text(json.dumps({"run": {}, "config": {}, "set": [], "started": started}))

    def unreached() -> set[Path]:
        return {Path(each["folder"]).resolve() for each in answer(root, "--dry-run", "--keep-runs", "1")["removed"]}

    def found() -> bool:
        """Whether its run stays with all that it links, and its release even without the run."""
        if unreached() & {run.resolve(), *linked}:
            return False
        (state / "runs").rename(tmp_path / "away")
        without = unreached()
        (tmp_path / "away").rename(state / "runs")
        return bool(without) and release not in without

    assert found()
    signed = visionloop("except", "2", "--gate", "class_recall", "--as", "Bob", "--reason", "I saw them", cwd=root)
    assert signed.returncode == 0, signed.stderr
    assert found()


def test_a_broken_ledger_and_no_last_run_are_refused(root: Path) -> None:
    state = root / ".visionloop"
    refused = visionloop("store", "gc", "--keep-runs", "0", cwd=root)
    assert refused.returncode == 2
    assert "expected at least 1" in refused.stderr
    (state / "ledger.db").write_bytes(b"no database")
    shutil.rmtree(state / "runs")
    before = Store(state / "store").artefacts()
    assert visionloop("store", "gc", cwd=root).returncode == 2
    assert Store(state / "store").artefacts() == before


def _copied(artefact: Path, copy: Path, epochs: int) -> None:
    """A published training of other weights, under another key."""
    shutil.copytree(artefact, copy)
    manifest = unseal((copy / MANIFEST).read_bytes())
    assert manifest is not None
    for entry in manifest["files"]:
        path = copy / entry["name"]
        path.write_bytes(path.read_bytes() + str(epochs).encode())
        entry |= describe(path, within=copy).to_json()
    manifest["record"]["epochs"] = epochs
    manifest["key"] = copy.name
    (copy / MANIFEST).write_bytes(seal(manifest))
