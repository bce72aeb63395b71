"""A workspace is a folder: a copy of it works by itself, and never reads from or writes to its original."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from shapes import LENIENT, visionloop

from components.contracts.errors import DataError
from flows.workspace.settings import began, identity, standing
from flows.workspace.workspace import Workspace


def tree_of(root: Path) -> dict[str, bytes]:
    """Every file below a folder, with its bytes; links with where they point."""
    found = {
        path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_symlink() or path.is_file()
    }
    return {name: os.readlink(path).encode() if path.is_symlink() else path.read_bytes() for name, path in found.items()}


def test_a_copy_promotes_and_trains_while_its_original_stays_as_it_is(trained: Path, tmp_path: Path) -> None:
    before = tree_of(trained)
    copy = Path(shutil.copytree(trained, tmp_path / "a copy", symlinks=True))

    def done(*arguments: str) -> str:
        answer = visionloop(*arguments, cwd=copy)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stderr

    assert f"this workspace lay in {trained} before" in done("approve", "1", "--as", "Ann", "--reason", "the copy's own")
    assert "lay in" not in done("promote", "1")
    assert "lay in" not in done("train", "-r", "smoke", "--set", f"gating.gates={LENIENT}")
    assert tree_of(trained) == before
    named = [path for path in copy.rglob("*") if path.is_file() and str(trained).encode() in path.read_bytes()]
    # Left are the summary that the fixture wrote, and caches of the place where it lay.
    assert {path.relative_to(copy).parts[:2] for path in named} <= {("summary.json",), (".visionloop", "cache")}


def test_a_copy_knows_none_of_its_originals_processes(tmp_path: Path) -> None:
    state = tmp_path / "original" / ".visionloop"
    (state / "up").mkdir(parents=True)
    (state / "up" / "auth").write_text("visionloop:secret")
    told = {
        "pid": os.getpid(),
        "began": began(os.getpid()),
        "api": "http://127.0.0.1:1/api",
        "folder": identity(state / "up"),
    }
    (state / "up" / "server.json").write_text(json.dumps(told))
    assert standing(state)["PREFECT_API_URL"] == told["api"]
    copy = Path(shutil.copytree(tmp_path / "original", tmp_path / "copy"))
    assert standing(copy / ".visionloop") == {}
    assert standing((tmp_path / "original").rename(tmp_path / "moved") / ".visionloop")["PREFECT_API_URL"] == told["api"]


def test_the_copy_of_a_git_worktree_is_refused(pristine: Path, tmp_path: Path) -> None:
    repository = Path(shutil.copytree(pristine, tmp_path / "repository", symlinks=True))
    worktree = tmp_path / "worktree"
    subprocess.run(["git", "worktree", "add", "--quiet", str(worktree)], cwd=repository, check=True)
    assert Workspace.find(worktree).root == worktree
    copy = Path(shutil.copytree(worktree, tmp_path / "copy", symlinks=True))
    with pytest.raises(DataError, match="copy of the git worktree .*worktree and would stage into its index.*git init"):
        Workspace.find(copy)
    worktree.rename(tmp_path / "moved")
    assert Workspace.find(tmp_path / "moved").root == tmp_path / "moved"
