"""Git, as far as versions of the data need it: what is asked of it and what it is told, whatever a person set for it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NoReturn

from components.contracts.errors import DataError

_OPTIONS = (
    "-c",
    "core.hooksPath=/dev/null",
    "-c",
    "core.fsmonitor=false",
    "-c",
    "core.autocrlf=false",
    "-c",
    "core.safecrlf=false",
    "-c",
    "core.quotePath=false",
    "-c",
    "color.ui=false",
)
"""What other people set for git and must not change what is recorded here."""


def _run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", *_OPTIONS, *arguments]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", errors="replace", check=False)
    except FileNotFoundError:
        raise DataError("git is not installed; data versions live in git, install it and run the command again") from None


def _failed(root: Path, arguments: tuple[str, ...], done: subprocess.CompletedProcess[str]) -> NoReturn:
    said = (done.stderr or done.stdout).strip()
    if "safe.directory" in said:
        # Git's own proposal names the folder that it means, in whatever language it speaks.
        proposed = re.search(r"safe\.directory (.*)", said)
        folder = proposed[1].strip() if proposed else f"'{root}'"
        raise DataError(
            f"git does not trust {root}, because it belongs to another account. If you trust it: "
            f"`git config --global --add safe.directory {folder}`; otherwise work as the account that owns it"
        )
    command = next((argument for argument in arguments if not argument.startswith("-") and "=" not in argument), "")
    raise DataError(f"git {command} failed in {root}: {said}")


def run(root: Path, *arguments: str) -> str:
    """Run git in `root` and return what it printed; raises DataError with git's own words."""
    done = _run(root, *arguments)
    if done.returncode:
        _failed(root, arguments, done)
    return done.stdout.strip()


def ask(root: Path, *arguments: str) -> str | None:
    """What git printed, byte for byte where that is UTF-8; None where it says no."""
    done = _run(root, *arguments)
    return None if done.returncode else done.stdout


def state(root: Path) -> tuple[str, bool]:
    """Commit of the workspace (`none` before the first one), and whether files that git sees differ from it."""
    asked = ("rev-parse", "--quiet", "--verify", "HEAD")
    done = _run(root, *asked)
    if done.returncode == 1 and not done.stderr.strip():
        return "none", True
    if done.returncode:
        _failed(root, asked, done)
    # A look at the state is no reason to write git's index, which others may be about to.
    status = run(
        root,
        "--no-optional-locks",
        "status",
        "--porcelain",
        "--untracked-files=normal",
        "--ignore-submodules=none",
        "--",
        ".",
    )
    return done.stdout.strip(), bool(status)


def stage(root: Path, *names: str) -> None:
    """Stage files of ours in git, whatever anyone's ignore rules say; raises DataError unless git then has them."""
    run(root, "add", "--force", "--", *names)
    listed = run(root, "ls-files", "-z", "--", *names).split("\0")
    missing = sorted(set(names) - set(listed))
    if missing:
        raise DataError(f"git did not take {', '.join(missing)} in {root}; see `git status` there")


_UNDER_WAY = (
    ("rebase-apply/applying", "am"),
    ("rebase-apply", "rebase"),
    ("rebase-merge", "rebase"),
    ("MERGE_HEAD", "merge"),
    ("CHERRY_PICK_HEAD", "cherry-pick"),
    ("REVERT_HEAD", "revert"),
)
"""What lies in git's folder while it waits for a person to go on, and the command that began it."""


def expect_nothing_under_way(root: Path) -> None:
    """Raise DataError where git waits for a person to go on with a merge, a rebase or the like.

    What is staged then, and the next commit, are of that and of no data version.
    """
    asked = [part for name, _ in _UNDER_WAY for part in ("--git-path", name)]
    paths = run(root, "rev-parse", *asked).splitlines()
    command = next((command for path, (_, command) in zip(paths, _UNDER_WAY, strict=True) if (root / path).exists()), "")
    if command:
        raise DataError(
            f"{root} is in the middle of `git {command}`, whose commit would take in the new data version. End it with `git "
            f"{command} --continue`, or take it back with `git {command} --abort`, then run the command again. Where "
            f"data.dvc and its companions are in conflict, take one side of all of them first: `git checkout --ours -- "
            f"data.dvc 'data.*.csv'`, then `git add` them. Nothing was changed"
        )


def top_folder(root: Path) -> Path:
    """The top folder of the git repository that the workspace is in; raises DataError when there is none."""
    return Path(run(root, "rev-parse", "--show-toplevel"))


def holds(root: Path) -> bool:
    """Whether a repository above `root` would hold its files: it has a work tree there and does not ignore the folder."""
    if not any((folder / ".git").exists() for folder in root.resolve().parents):
        return False
    inside = _run(root, "rev-parse", "--is-inside-work-tree")
    if inside.returncode and "safe.directory" in inside.stderr:
        _failed(root, ("rev-parse",), inside)
    if inside.stdout.strip() != "true":
        return False
    return _run(root, "check-ignore", "--quiet", "--no-index", "--", str(root.resolve())).returncode != 0
